"""Which blocks of a pool are whose."""

from __future__ import annotations

from collections.abc import Sequence


class BlockPool:
    """Hands out blocks by number, and takes them back when their last owner has gone.

    Whoever will need blocks has them promised first: what is promised is taken later without fail.

    Args:
        num_blocks: blocks of the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free = [*reversed(range(num_blocks))]  # those given back last are taken first
        self._owners = [0] * num_blocks
        self._promised = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    @property
    def num_open(self) -> int:
        """Blocks that can still be promised."""
        return len(self._free) - self._promised

    def promise(self, count: int) -> None:
        """Keep so many blocks. Raises ValueError if there are fewer that can be promised."""
        if not 0 <= count <= self.num_open:
            raise ValueError(f"{count} blocks cannot be promised: {self.num_open} of {self.num_blocks} are open")
        self._promised += count

    def withdraw(self, count: int) -> None:
        """Give up a promise of so many. Raises ValueError if fewer are promised."""
        if not 0 <= count <= self._promised:
            raise ValueError(f"{count} blocks are no longer needed, and {self._promised} are promised")
        self._promised -= count

    def take(self, count: int) -> list[int]:
        """So many of the blocks promised, with one owner each. Raises ValueError if fewer are promised."""
        self.withdraw(count)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Give blocks one more owner each. Raises ValueError if one has none."""
        self._check(blocks)
        for block in blocks:
            self._owners[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Take blocks from one of their owners. Raises ValueError if one has none."""
        self._check(blocks)
        for block in blocks:
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free.append(block)

    def owners(self, block: int) -> int:
        """How many own a block."""
        return self._owners[block]

    def _check(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if self._owners[block] == 0:
                raise ValueError(f"block {block} has no owner")
