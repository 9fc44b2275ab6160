"""How ragged attention is cut into programs: from sizes that the host knows, never from data.

So a launch can be captured in a CUDA graph and replayed for any offsets and lengths.
"""

import functools
from dataclasses import dataclass, replace

import torch

# Keys of a block, in bytes, by bytes of an element: with three stages of keys and values two programs fit into an SM's
# shared memory. float32 is multiplied without tensor cores, from registers, and gets less.
_BLOCK_BYTES = {2: 16 * 1024, 4: 8 * 1024}
# Elements of a tile's sums, which lie in registers: found by compiling for sm_90 until next to nothing was spilled.
_TILE_ELEMENTS = {2: 128 * 128, 4: 16 * 128}
_LEAST_BLOCK = 16  # of tensor cores
_OVERHEAD_BYTES = 4096  # of shared memory: barriers, and what reductions exchange
_WARPS_PER_PROCESSOR = 8  # two programs of four warps; where a second of eight had to be split off, an H100 took 1.6x
_MIN_BLOCKS_PER_SPLIT = 2  # with fewer, starting and merging a split costs more than the split saves
_MAX_SPLITS = 64  # the merge holds a query's partial results of all splits in registers


@dataclass(frozen=True)
class Processors:
    """What a launch is planned for.

    Attributes:
        count: SMs of the device.
        shared_memory: bytes that one program may have.
    """

    count: int
    shared_memory: int


@dataclass(frozen=True)
class AttentionSizes:
    """What the host knows of a call of `emssd::ragged_attention`.

    Attributes:
        num_tokens: T.
        num_rows: B.
        capacity: C.
        num_heads: Hq.
        num_kv_heads: Hkv.
        head_size: Dk.
        value_size: Dv.
        dtype: of queries, keys and values.
    """

    num_tokens: int
    num_rows: int
    capacity: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LaunchConfig:
    """The grid is `(num_tiles, Hkv, num_splits)`: a program is a tile of queries, a KV head and a part of the slots.

    Attributes:
        block_queries: queries of a tile. The heads that share a KV head times the tokens of a row are one list of
            queries, cut into tiles.
        block_slots: cache slots whose keys are loaded at once.
        num_tiles: no schedule of the rows needs more; those that this one does not need exit at once.
        num_splits: parts into which the slots of each row are split.
        num_warps, num_stages: as Triton has them.
    """

    block_queries: int
    block_slots: int
    num_tiles: int
    num_splits: int
    num_warps: int = 4
    num_stages: int = 3

    def shared_memory(self, sizes: AttentionSizes) -> int:
        """Bytes that a program needs at most, as Triton was seen to allot them.

        For queries and results, the blocks of keys and values that are loaded ahead, and the weights of a block;
        without tensor cores one more block goes through it.
        """
        head, item = block_size(max(sizes.head_size, sizes.value_size)), sizes.dtype.itemsize
        blocks = 2 * (self.num_stages - 1) + (item == 4)
        elements = self.block_queries * (2 * head + self.block_slots) + blocks * self.block_slots * head
        return elements * item + _OVERHEAD_BYTES


@functools.lru_cache(maxsize=1024)
def plan_launch(sizes: AttentionSizes, processors: Processors) -> LaunchConfig:
    """A launch that keeps all SMs busy, fits into their shared memory and reads each key once per KV head and tile.

    Splits follow Flash-Decoding (https://pytorch.org/blog/flash-decoding): few rows with long contexts leave SMs idle
    unless the slots of a row are spread over several programs.
    """
    group = sizes.num_heads // sizes.num_kv_heads
    rows = max(1, min(sizes.num_rows, sizes.num_tokens))
    queries_per_row = -(-sizes.num_tokens // rows) * group
    block_head = block_size(max(sizes.head_size, sizes.value_size))
    item = sizes.dtype.itemsize
    block_slots = min(max(_BLOCK_BYTES[item] // (block_head * item), _LEAST_BLOCK), 128)
    block_queries = min(block_size(queries_per_row), max(_TILE_ELEMENTS[item] // block_head, _LEAST_BLOCK), 128)
    blocks = _fitting(LaunchConfig(block_queries, block_slots, 1, 1), sizes, processors.shared_memory)
    num_warps = 8 if blocks.block_queries >= 64 else 4
    programs = rows * -(-queries_per_row // blocks.block_queries) * sizes.num_kv_heads
    at_once = processors.count * _WARPS_PER_PROCESSOR // num_warps
    return replace(
        blocks,
        num_tiles=max_tiles(sizes.num_tokens, sizes.num_rows, group, blocks.block_queries),
        num_splits=_num_splits(programs, at_once, sizes.capacity, blocks.block_slots),
        num_warps=num_warps,
    )


def _fitting(launch: LaunchConfig, sizes: AttentionSizes, shared_memory: int) -> LaunchConfig:
    """Less is loaded ahead, then fewer slots and then fewer queries at once, until the shared memory suffices."""
    while launch.shared_memory(sizes) > shared_memory:
        if launch.num_stages > 2:
            launch = replace(launch, num_stages=launch.num_stages - 1)
        elif launch.block_slots > _LEAST_BLOCK:
            launch = replace(launch, block_slots=launch.block_slots // 2)
        elif launch.block_queries > _LEAST_BLOCK:
            launch = replace(launch, block_queries=launch.block_queries // 2)
        else:
            break  # Triton will say so
    return launch


def block_size(size: int) -> int:
    """The extent of a block that holds `size` elements: a power of two, and as many as tensor cores need."""
    return max(_LEAST_BLOCK, 1 << (size - 1).bit_length())


def max_tiles(num_tokens: int, num_rows: int, group: int, block_queries: int) -> int:
    """Most tiles that any offsets need. The tail of T is one more row.

    Row b's tiles are numbered from `offsets[b] * group // block_queries + b`: this leaves room for all of them, since
    `ceil(y - x) <= floor(y) - floor(x) + 1`, and a program finds its row without a scan over the rows before.
    """
    return num_tokens * group // block_queries + num_rows + 1


def _num_splits(programs: int, at_once: int, capacity: int, block_slots: int) -> int:
    wanted = at_once // programs if programs else 1
    return max(1, min(wanted, capacity // (block_slots * _MIN_BLOCKS_PER_SPLIT), _MAX_SPLITS))
