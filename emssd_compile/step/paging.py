"""KV caches whose rows share a pool of blocks: the sizes that the step and whoever drives it agree on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from emssd_compile.errors import OptionError
from emssd_compile.step.drafting import Drafter

BLOCK_SIZE = 64
"""P: as many tokens as the kernel for CPUs reads at once; those for GPUs read no more, and a power of two."""
MOST_BLOCK_SIZE = 4096

DRAFTER = "drafter_"
"""How the names of a drafter's own caches begin."""

BLOCK_TABLE = "block_table"
"""The input that says where rows are: int32 `[B, M]`, the number of each row's m-th block, -1 for none."""


@dataclass(frozen=True)
class Sharing:
    """What rows may have in common.

    Attributes:
        prompts: whether rows of one prompt share its blocks: not where a drafter reads prompts by itself, and so writes
            its keys and values of them anew.
        lookahead: tokens behind a block that what it holds depends on, as a drafter's own keys and values may. None
            where blocks are not found by the tokens in them and before.
        keeps: whether they are found when the call that read them is over.
        why_not: why they are not found.
    """

    prompts: bool = True
    lookahead: int | None = None
    keeps: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Paging:
    """A pool of blocks in the place of a slab for each row.

    Attributes:
        num_blocks: blocks of the pool.
        rows: B.
        capacity: C, tokens that a row may hold.
        spare: slots that a row may need behind its last token, for trees of drafts.
        sharing: what rows may have in common.
        block_size: P, tokens of a block.
        caches: names of the caches that are in the pool, the same in all forms of a step; None for all that can be.

    Raises:
        OptionError: P is not a power of two from 1 to `MOST_BLOCK_SIZE`.
    """

    num_blocks: int
    rows: int
    capacity: int
    spare: int = 0
    sharing: Sharing = field(default_factory=Sharing)
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


def check_kv_tokens(kv_tokens: int, spare: int, block_size: int = BLOCK_SIZE) -> None:
    """Raises OptionError if a pool of so many tokens is too small for any request; its row needs `spare` slots more."""
    blocks = -(-(2 + spare) // block_size)
    if kv_tokens < blocks * block_size:
        raise OptionError(
            f"kv_tokens={kv_tokens} is too small: blocks have {block_size} tokens, and the shortest request takes "
            f"{blocks}; pass at least {blocks * block_size}"
        )


def own_reading(drafter: Drafter) -> bool:
    """Whether it reads texts from their beginnings with a model of its own, whatever the target has read."""
    return drafter.reads_ahead and not drafter.remembers_features


def sharing_of(
    drafter: Drafter, depth: int, pooled: Collection[str], slabs: Collection[str], *, keeps: bool, has_rings: bool
) -> Sharing:
    """What rows may have in common.

    Args:
        drafter: of the step.
        depth: D.
        pooled, slabs: the names of the caches that are in the pool, and of those that are not.
        keeps: whether what is read is to be found in later calls.
        has_rings: whether other caches keep a window only.
    """
    if has_rings:
        why = "layers that keep a window lack what came before it"
        return Sharing(prompts=not drafter.reads_ahead, keeps=keeps, why_not=why)
    own = [name for name in pooled if name.startswith(DRAFTER)]
    kind, lookahead = type(drafter).__name__, depth if own else 0
    if targets := [name for name in slabs if not name.startswith(DRAFTER)]:
        return Sharing(keeps=keeps, why_not=f"{targets[0]} is used in a way that no pool knows")
    if own_reading(drafter):
        if own:
            return Sharing(
                prompts=False, keeps=keeps, why_not=f"{kind} reads each prompt by itself, into the same blocks"
            )
        return Sharing(lookahead=0, keeps=keeps)
    if drafter.reads_ahead or slabs or (own and drafter.is_costly and not drafter.remembers_features):
        why = f"{kind} keeps keys and values of its own that it would lack of a text that another row has read"
        return Sharing(prompts=not drafter.reads_ahead, keeps=keeps, why_not=why)
    return Sharing(lookahead=lookahead, keeps=keeps)
