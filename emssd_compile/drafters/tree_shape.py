"""Trees of drafts that have the same shape in all rows and steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, shown

MOST_NODES = 512
"""Most drafts of a tree: who descends from whom is worked out for each pair of them, in each row and step."""


@dataclass(frozen=True)
class TreeShape:
    """A tree in which all nodes of a depth have equally many children.

    Nodes are numbered breadth first: the root is node 0, then come its children, then the children of node 1, of node
    2, and so on.

    Attributes:
        branching: children of the root, of each node at depth 1, of each at depth 2, ...
    """

    branching: tuple[int, ...]

    @classmethod
    def of(cls, option: str, branching: object) -> TreeShape:
        """The tree that an option asks for. Raises OptionError naming the option if it asks for none."""
        if not isinstance(branching, Iterable) or isinstance(branching, str):
            raise OptionError(f"{option}={shown(branching)} is not a sequence of integers, such as (4, 2, 2)")
        shape = cls(tuple(integer(f"{option}[{index}]", value, least=1) for index, value in enumerate(branching)))
        if not 1 <= shape.num_nodes <= MOST_NODES:
            raise OptionError(f"{option}={shape.branching} has {shape.num_nodes} drafts; use 1 to {MOST_NODES}")
        return shape

    @property
    def depth(self) -> int:
        """D, edges between the root and the deepest nodes."""
        return len(self.branching)

    @property
    def levels(self) -> tuple[int, ...]:
        """How many nodes there are at depth 1, 2, ..., D."""
        return tuple(accumulate(self.branching, mul))

    @property
    def num_nodes(self) -> int:
        """K, nodes besides the root."""
        return sum(self.levels)

    def parents(self, device: torch.device) -> Tensor:
        """int64 `[K]`, the node that each node but the root follows."""
        sizes = (1, *self.levels)
        firsts = (0, *accumulate(sizes))
        return torch.cat(
            [
                torch.arange(first, first + size, device=device)[:, None].expand(size, children).flatten()
                for first, size, children in zip(firsts, sizes, self.branching, strict=False)
            ]
        )

    def depths(self, device: torch.device) -> Tensor:
        """int64 `[K]`, the depth of each node but the root; ascending."""
        return torch.cat([torch.full((size,), depth, device=device) for depth, size in enumerate(self.levels, 1)])
