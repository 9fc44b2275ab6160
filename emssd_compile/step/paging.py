"""KV caches whose rows share a pool of blocks: the sizes that the step and whoever drives it agree on."""

from __future__ import annotations

from dataclasses import dataclass

from emssd_compile.errors import OptionError

BLOCK_SIZE = 64
"""P: as many tokens as the kernel for CPUs reads at once; those for GPUs read no more, and a power of two."""
MOST_BLOCK_SIZE = 4096

BLOCK_TABLE = "block_table"
"""The input that says where rows are: int32 `[B, M]`, the number of each row's m-th block, -1 for none."""


@dataclass(frozen=True)
class Paging:
    """A pool of blocks in the place of a slab for each row.

    Attributes:
        num_blocks: blocks of the pool.
        rows: B.
        capacity: C, tokens that a row may hold.
        spare: slots that a row may need behind its last token, for trees of drafts.
        shares: whether rows of one prompt may have blocks in common: not where a drafter reads prompts by itself, and
            so writes its keys and values of them anew.
        block_size: P, tokens of a block.
        caches: names of the caches that are in the pool, the same in all forms of a step; None for all that can be.

    Raises:
        OptionError: P is not a power of two from 1 to `MOST_BLOCK_SIZE`.
    """

    num_blocks: int
    rows: int
    capacity: int
    spare: int = 0
    shares: bool = True
    block_size: int = BLOCK_SIZE
    caches: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        size = self.block_size
        if not 1 <= size <= MOST_BLOCK_SIZE or size & (size - 1):
            raise OptionError(f"block_size={size} is out of range; pass a power of two from 1 to {MOST_BLOCK_SIZE}")

    @property
    def row_blocks(self) -> int:
        """M, the most blocks that a row has."""
        return self.blocks_of(self.capacity)

    @property
    def num_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.num_blocks * self.block_size

    def blocks_of(self, tokens: int) -> int:
        """Blocks of a row that may come to hold so many tokens."""
        return -(-(tokens + self.spare) // self.block_size)
