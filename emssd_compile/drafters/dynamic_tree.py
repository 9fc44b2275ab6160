"""Trees of drafts that grow where the drafter is sure (EAGLE-2, 2406.16858)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from emssd_compile.drafters.tree_shape import MOST_NODES
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer


@dataclass(frozen=True)
class DynamicTree:
    """How large a tree grows, and how much of it is verified.

    Behind the root come the `width` likeliest tokens. At each depth, the `width` nodes whose path is likeliest are read
    by the drafter, and the `width` likeliest tokens are put behind each of them. Of all these, the `nodes` with the
    likeliest paths are verified.

    Attributes:
        nodes: K, drafts that are verified.
        depth: D, most drafts on a path.
        width: nodes that are read at each depth, and tokens behind each.

    Raises:
        OptionError: a number is out of range, or the tree has fewer nodes than are to be verified, or the drafter would
            read more of them than the target.
    """

    nodes: int = 16
    depth: int = 5
    width: int = 4

    def __post_init__(self) -> None:
        for name in ("nodes", "depth", "width"):
            integer(f"DynamicTree {name}", getattr(self, name), least=1, most=MOST_NODES)
        most = self.width + (self.depth - 1) * self.width**2
        if not self.fed - 1 <= self.nodes <= most:
            bound = f"at most {most}" if self.nodes > most else f"at least {self.fed - 1}"
            raise OptionError(
                f"DynamicTree nodes={self.nodes} does not go with depth={self.depth} and width={self.width}; "
                f"pass {bound} nodes"
            )

    @property
    def fed(self) -> int:
        """Nodes of a row that the drafter reads: those of the last depth are not."""
        return self.width * (self.depth - 1)


@dataclass(frozen=True)
class Beam:
    """The nodes of one depth that drafts are put behind, n of each row: first the root, then those with most promise.

    Attributes:
        tokens: int64 `[B, n]`.
        numbers: int64 `[B, n]`, of the nodes: 0 for the root, i for the i-th draft.
        scores: float32 `[B, n]`, log-probability of the path.
        sees: bool `[B, n, F]`, which of the F nodes read so far each descends from, itself included.
        origins: int64 `[B, n]`, the place in the beam before of the node that each follows.
    """

    tokens: Tensor
    numbers: Tensor
    scores: Tensor
    sees: Tensor
    origins: Tensor

    @classmethod
    def of_roots(cls, roots: Tensor, fed: int) -> Beam:
        """That of the root tokens `[B]`, for trees of which `fed` nodes are read."""
        zeros = torch.zeros_like(roots)[:, None]  # [B, 1]
        sees = zeros[:, :, None].expand(-1, -1, fed) > 0
        return cls(roots[:, None], zeros, torch.zeros_like(zeros, dtype=torch.float32), sees, zeros)


@dataclass
class GrowingTree:
    """The drafts made so far, numbered from 1 on in the order made: a parent before its children.

    Attributes:
        shape: how far it grows.
        max_drafts: int64 `[B]`, the most drafts on a path of each row.
        beam: what drafts are to be put behind next.
        tokens, parents, scores, probabilities: `[B, drafts of a depth]` of each depth.
    """

    shape: DynamicTree
    max_drafts: Tensor
    beam: Beam
    tokens: list[Tensor] = field(default_factory=list)
    parents: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def grow(self, tokens: Tensor, log_q: Tensor) -> None:
        """Put drafts behind each node of the beam, and take those with most promise as the next one.

        Args:
            tokens: int64 `[B * n, width]`.
            log_q: float32 `[B * n, width]`, log-probabilities where they stand, at most 0.
        """
        beam, width, depth = self.beam, self.shape.width, len(self.tokens)
        first = 1 + sum(level.shape[1] for level in self.tokens)
        scores = (beam.scores[:, :, None] + log_q.view(*beam.scores.shape, width)).flatten(1)  # [B, n * width]
        scores = torch.where(depth < self.max_drafts[:, None], scores, -torch.inf)
        tokens = tokens.view_as(scores)
        self.tokens.append(tokens)
        self.parents.append(beam.numbers.repeat_interleave(width, 1))
        self.scores.append(scores)
        self.probabilities.append(log_q.view_as(scores).exp())
        best = ranked(scores, width)  # [B, width]
        origins = best // width
        fed = torch.arange(beam.sees.shape[2], device=best.device)
        own = fed == depth * width + torch.arange(width, device=best.device)[:, None]  # [width, F]
        above = beam.sees.gather(1, origins[:, :, None].expand(-1, -1, len(fed)))
        self.beam = Beam(tokens.gather(1, best), first + best, scores.gather(1, best), above | own, origins)

    def kept(self) -> Kept:
        """The drafts with the likeliest paths."""
        tokens, parents, scores, probabilities = (
            torch.cat(levels, 1) for levels in (self.tokens, self.parents, self.scores, self.probabilities)
        )  # [B, drafts]
        return likeliest_paths(tokens, parents, scores, probabilities, self.shape.nodes)


@dataclass(frozen=True)
class Kept:
    """The drafts of a tree to be verified, a parent before its children.

    Attributes:
        tokens: int64 `[B, K]`.
        parents: int64 `[B, K]`, the node that each follows: 0 for the root, i for the i-th of them.
        probabilities: float32 `[B, K]`, of each where it stands.
        lengths: int64 `[B]`, how many there are.
    """

    tokens: Tensor
    parents: Tensor
    probabilities: Tensor
    lengths: Tensor


def likeliest_paths(tokens: Tensor, parents: Tensor, scores: Tensor, probabilities: Tensor, count: int) -> Kept:
    """The drafts with the likeliest paths, renumbered; of equals the first, so none comes without its parent.

    Args:
        tokens, parents: int64 `[B, drafts]`, numbered from 1 on: a parent before its children.
        scores: float32 `[B, drafts]`, log-probabilities of their paths, no larger than a parent's; -inf for none.
        probabilities: float32 `[B, drafts]`, of each where it stands.
        count: K.
    """
    best = ranked(scores, count)  # [B, K]
    possible = scores.gather(1, best) > -torch.inf
    # In the order of their numbers, and what cannot be behind them.
    numbers = torch.where(possible, best, scores.shape[1]).sort(1).values.clamp(max=scores.shape[1] - 1)
    above = parents.gather(1, numbers)  # [B, K], by the numbers before
    is_parent = numbers[:, None] + 1 == above[:, :, None]  # [B, child, parent]
    place = torch.arange(1, count + 1, device=best.device)
    return Kept(
        tokens=tokens.gather(1, numbers),
        parents=torch.where(is_parent, place, 0).amax(2),
        probabilities=probabilities.gather(1, numbers),
        lengths=possible.sum(1),
    )


def ranked(scores: Tensor, count: int) -> Tensor:
    """The places of the best `count` scores of each row, `[B, count]`, the best first; of equals the first ones."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
