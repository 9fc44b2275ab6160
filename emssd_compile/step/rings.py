"""KV caches that keep the window of each row: the sizes that the step and whoever drives it agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from emssd_compile.step.paging import BLOCK_SIZE


@dataclass(frozen=True)
class Rings:
    """Slots that a row writes to again and again: slot s lies where slot s - size lay before it.

    A step adds up to N tokens to a row before it is known which of them stay, and the first of them may see W tokens,
    itself included. So nothing that is still seen is overwritten if there are W + N - 1 slots; they are rounded up to
    whole blocks.

    Attributes:
        reaches: W of each cache that is a ring, by its name.
        num_new: N, the most tokens of a row in one step.
        block_size: P, slots of a block.
    """

    reaches: Mapping[str, int]
    num_new: int
    block_size: int = BLOCK_SIZE

    def row_blocks(self, name: str) -> int:
        """Blocks that each row has of a cache."""
        return -(-(self.reaches[name] + self.num_new - 1) // self.block_size)

    def size(self, name: str) -> int:
        """Slots that each row has of a cache."""
        return self.row_blocks(name) * self.block_size

    def hold(self, num_read: int, num_written: int) -> bool:
        """Whether a row that has written to so many slots still has what is seen from slot `num_read` on."""
        return all(
            num_written - self.size(name) <= max(num_read - reach + 1, 0) for name, reach in self.reaches.items()
        )
