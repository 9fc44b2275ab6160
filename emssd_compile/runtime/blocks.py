"""Which blocks of a pool are whose, and what those hold that are nobody's any more."""

from __future__ import annotations

from collections.abc import Sequence


class BlockPool:
    """Hands out blocks by number, and takes them back when their last owner has gone.

    Whoever will need blocks has them promised first: what is promised is taken later without fail.

    What a full block holds may be given a key. Then it is found by that until it is handed out again, also when it has
    no owner any more; of those without, the one given back first is handed out first, and those without a key before.

    Args:
        num_blocks: blocks of the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blank = [*reversed(range(num_blocks))]  # without owner or key; those given back last are taken first
        self._idle: dict[int, None] = {}  # without owner, with a key: those given back first are first
        self._owners = [0] * num_blocks
        self._promised = 0
        self._found: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._blank) + len(self._idle)

    @property
    def num_open(self) -> int:
        """Blocks that can still be promised."""
        return self.num_free - self._promised

    @property
    def num_kept(self) -> int:
        """Blocks that have a key."""
        return len(self._keys)

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
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Give blocks one more owner each.

        Those without one are no longer free, so they must not have been promised.

        Raises:
            ValueError: a block has neither owner nor key, or there are fewer open ones than are without an owner.
        """
        self._check(blocks, self._idle)
        if self.num_idle(blocks) > self.num_open:
            raise ValueError(f"{self.num_idle(blocks)} blocks are without an owner, and {self.num_open} are open")
        for block in blocks:
            self._idle.pop(block, None)
            self._owners[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Take blocks from one of their owners; the last of them are handed out first.

        Raises:
            ValueError: one has no owner.
        """
        self._check(blocks)
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block] == 0 and block in self._keys:
                self._idle[block] = None
            elif self._owners[block] == 0:
                self._blank.append(block)

    def owners(self, block: int) -> int:
        """How many own a block."""
        return self._owners[block]

    def keep(self, block: int, key: bytes) -> None:
        """Let an owned block be found by the key of what it holds, unless another one is.

        Raises:
            ValueError: it has no owner.
        """
        self._check([block])
        if key not in self._found and block not in self._keys:
            self._found[key], self._keys[block] = block, key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the first keys, up to one that there is no block of."""
        found = []
        for key in keys:
            if (block := self._found.get(key)) is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these have no owner."""
        return sum(self._owners[block] == 0 for block in blocks)

    def forget(self) -> None:
        """Find no block any more."""
        self._blank += self._idle
        for kept in (self._idle, self._found, self._keys):
            kept.clear()

    def _evict(self) -> int:
        """The block without an owner that was given back first; what it holds is found no more."""
        block = next(iter(self._idle))
        del self._idle[block], self._found[self._keys.pop(block)]
        return block

    def _check(self, blocks: Sequence[int], *others: dict[int, None]) -> None:
        for block in blocks:
            if self._owners[block] == 0 and not any(block in known for known in others):
                raise ValueError(f"block {block} has no owner")
