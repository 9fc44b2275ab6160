"""Trees of drafts that were made for each depth by itself (DDTree, 2604.12989)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.drafters.dynamic_tree import Kept, likeliest_paths, ranked
from emssd_compile.drafters.tree_shape import MOST_NODES
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer


@dataclass(frozen=True)
class MarginalTree:
    """How many drafts of all that can be put together are verified.

    A block drafter says of each depth what is likely there, whatever the tokens before are. So every sequence of these
    tokens is a path, as likely as the product of its tokens. The tree is made of the `nodes` likeliest paths of any
    length; a path is never likelier than what it begins with, so none comes without its beginning.

    Attributes:
        nodes: K, drafts that are verified.
        width: the likeliest tokens of each depth that paths are made of.

    Raises:
        OptionError: a number is out of range.

    Example:
        With probabilities 0.6, 0.3 at depth 1 and 0.8, 0.1 at depth 2, the three likeliest paths are (0), (0, 0) and
        (1): 0.6, 0.48 and 0.3. The next one is (1, 0): 0.24.
    """

    nodes: int = 32
    width: int = 8

    def __post_init__(self) -> None:
        for name in ("nodes", "width"):
            integer(f"MarginalTree {name}", getattr(self, name), least=1, most=MOST_NODES)

    def check(self, depth: int) -> None:
        """Raises OptionError if there are fewer paths than `nodes` where a path has at most `depth` tokens."""
        paths = 0
        for _ in range(depth):
            paths = min((paths + 1) * self.width, MOST_NODES)
        if self.nodes > paths:
            raise OptionError(
                f"MarginalTree nodes={self.nodes} are more than the {paths} paths of up to {depth} tokens among "
                f"width={self.width} each; pass fewer, or a larger width"
            )

    def grow(self, tokens: Tensor, log_q: Tensor, max_drafts: Tensor) -> Kept:
        """The tree of each row, by the likeliest tokens of each depth.

        A node of depth d comes with d - 1 nodes above it, so only the `nodes - d + 1` likeliest of that depth can be in
        the tree, and what is behind the others cannot.

        Args:
            tokens: int64 `[B, D, width]`.
            log_q: float32 `[B, D, width]`, their log-probabilities, at most 0, descending.
            max_drafts: int64 `[B]`, the most drafts on a path of each row.
        """
        depth, width = tokens.shape[1:]
        numbers = torch.zeros_like(tokens[:, 0, :1])  # [B, 1], of the beam: the root
        above = torch.zeros_like(log_q[:, 0, :1])  # [B, 1], log-probabilities of its paths
        levels: list[
            tuple[Tensor, ...]
        ] = []  # token, parent, path and own log-probability, [B, drafts of a depth] each
        count = 0
        for level in range(depth):
            scores = (above[:, :, None] + log_q[:, level, None]).flatten(1)  # [B, n * width]
            scores = torch.where(level < max_drafts[:, None], scores, -torch.inf)
            best = ranked(scores, min(scores.shape[1], self.nodes - level))  # [B, m]
            rank, parents = best % width, numbers.gather(1, best // width)
            above = scores.gather(1, best)
            levels.append((tokens[:, level].gather(1, rank), parents, above, log_q[:, level].gather(1, rank)))
            numbers = count + 1 + torch.arange(best.shape[1], device=best.device).expand_as(best)
            count += best.shape[1]
        drafts, parents, paths, own = (torch.cat(each, 1) for each in zip(*levels, strict=True))
        return likeliest_paths(drafts, parents, paths, own.exp(), self.nodes)
