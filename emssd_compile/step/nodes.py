"""Drafts of all rows, as chains or as trees.

The nodes of a row are its root token, which is node 0, and its drafts; draft `i` is node `i + 1`. In a chain each node
follows the one before it. In a tree it follows any node before it, its parent, so several may follow the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from emssd_compile.step.fields import STATIC, holds_tensors


@holds_tensors
@dataclass
class Nodes:
    """What a step verifies of each row, besides its root token.

    Attributes:
        tokens: int64 `[B, K]`; rubbish from `lengths` on, as in `grades` and `parents`.
        lengths: int64 `[B]`, drafts of each row, 0 to K: the first ones.
        grades: int64 `[B, K]`, the drafter's grade of each draft (see `Draft.grades`).
        parents: int64 `[B, K]`, the node that each draft follows, 0 to K; None where drafts are chains.
        max_depth: D, most edges between the root and a draft; K where drafts are chains.
        proposal: float32 `[B, K + 1, V]`, q: line n is the distribution that the drafts behind node n were drawn from;
            rubbish where none follow. None where drafts are not drawn, or the rule does not ask what from.
    """

    tokens: Tensor
    lengths: Tensor
    grades: Tensor
    parents: Tensor | None
    max_depth: int = field(metadata=STATIC)
    proposal: Tensor | None = None

    @property
    def exist(self) -> Tensor:
        """Bool `[B, K]`, which drafts there are."""
        return self.index < self.lengths[:, None]

    @property
    def index(self) -> Tensor:
        """int64 `[K]`, the number of each draft among its row's."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)


@holds_tensors
@dataclass
class Lineage:
    """Who descends from whom in the trees of drafts.

    Attributes:
        descends: bool `[B, K + 1, K + 1]`, whether node i is node j or descends from it.
        depths: int64 `[B, K + 1]`, edges between each node and the root.
    """

    descends: Tensor
    depths: Tensor

    @classmethod
    def of(cls, parents: Tensor, max_depth: int) -> Lineage:
        """That of drafts with these parents, `[B, K]`, none of them deeper than `max_depth`."""
        above = torch.cat([torch.zeros_like(parents[:, :1]), parents], 1)  # [B, N], the root is its own parent
        nodes = torch.arange(above.shape[1], device=above.device)  # [N]
        current = nodes.expand_as(above)  # [B, N]
        descends = current[:, :, None] == nodes  # [B, N, N]
        depths = torch.zeros_like(above)
        for _ in range(max_depth):
            depths = depths + (current > 0)
            current = above.gather(1, current)
            descends = descends | (current[:, :, None] == nodes)
        return cls(descends, depths)

    def closed(self, drafts: Tensor) -> Tensor:
        """Those of `drafts`, bool `[B, K]`, whose ancestors are all among them."""
        return ~(self.descends[:, 1:, 1:] & ~drafts[:, None]).any(2)


def of_parents(values: Tensor, parents: Tensor, root: float) -> Tensor:
    """`[B, K]`: what belongs to the parent of each draft, for `values[B, K]` of drafts and `root` for the root."""
    return torch.where(parents > 0, values.gather(1, (parents - 1).clamp(min=0)), root)


def select(nodes: Nodes, kept: Tensor) -> Nodes:
    """The drafts that are kept, renumbered, in the order they had.

    Args:
        nodes: drafts.
        kept: bool `[B, K]`; the parent of a draft that is kept is kept, and of a chain the first ones are.
    """
    lengths = kept.sum(1)
    if nodes.parents is None:
        return replace(nodes, lengths=lengths)
    place = kept.cumsum(1)  # [B, K], the number of each node that is kept
    is_moved = kept[:, None] & (place[:, None] == nodes.index[:, None] + 1)  # [B, new, old]
    source = torch.where(is_moved, nodes.index, 0).sum(2)  # [B, new]
    proposal = nodes.proposal
    if proposal is not None:
        lines = torch.cat([torch.zeros_like(source[:, :1]), source + 1], 1)  # [B, K + 1], the root stays
        proposal = proposal[torch.arange(lines.shape[0], device=lines.device)[:, None], lines]
    return replace(
        nodes,
        tokens=nodes.tokens.gather(1, source),
        lengths=lengths,
        grades=nodes.grades.gather(1, source),
        parents=of_parents(place, nodes.parents, root=0).gather(1, source),
        proposal=proposal,
    )
