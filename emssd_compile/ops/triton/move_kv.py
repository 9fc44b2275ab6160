"""``emssd::move_kv`` by one Triton kernel for keys and values together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOVES = 16  # most tokens that one program holds at once
_BLOCK = 256  # elements of a token that one program moves


@triton.jit
def _move(
    k_cache,
    v_cache,
    starts,
    path,
    counts,
    block_table,  # int32 [B, row_blocks], or None where each row has a slab
    k_cache_strides,
    v_cache_strides,
    start_stride,
    path_strides,
    count_stride,
    num_nodes,
    capacity,
    row_blocks,
    KEY_ELEMENTS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_ELEMENTS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,  # slots of a block of the pool
):
    """All moves of one row, BLOCK elements of each key and as many of each value."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row * start_stride)
    count = tl.minimum(tl.load(counts + row * count_stride), num_nodes)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for first in range(0, count, MOVES):
        depth = first + tl.arange(0, MOVES)
        node = tl.load(path + row * path_strides[0] + depth * path_strides[1], mask=depth < count, other=0)
        # What a GPU cannot report must at least not reach another row's slots.
        moves = (node > depth) & (start >= 0) & (start + node < capacity)
        source, target = start + node, start + depth
        source_line, target_line = row, row
        if block_table is not None:
            table = block_table + row * row_blocks
            source_line = tl.load(table + source // PAGE, mask=moves, other=-1).to(tl.int64)
            target_line = tl.load(table + target // PAGE, mask=moves, other=-1).to(tl.int64)
            moves &= (source_line >= 0) & (target_line >= 0)
            source, target = source % PAGE, target % PAGE
        keys_from = source_line * k_cache_strides[0] + source * k_cache_strides[1]
        keys_to = target_line * k_cache_strides[0] + target * k_cache_strides[1]
        _copy(k_cache, k_cache_strides, keys_from, keys_to, moves, element, KEY_ELEMENTS, KEY_SIZE)
        values_from = source_line * v_cache_strides[0] + source * v_cache_strides[1]
        values_to = target_line * v_cache_strides[0] + target * v_cache_strides[1]
        _copy(v_cache, v_cache_strides, values_from, values_to, moves, element, VALUE_ELEMENTS, VALUE_SIZE)


@triton.jit
def _copy(cache, strides, source, target, moves, element, ELEMENTS: tl.constexpr, SIZE: tl.constexpr):
    """Tokens from and to these places of a cache."""
    head, dim = element // SIZE, element % SIZE
    inside = moves[:, None] & (element < ELEMENTS)[None, :]
    first = cache + (head * strides[2] + dim * strides[3])[None, :]
    held = tl.load(first + source[:, None], mask=inside)
    tl.debug_barrier()  # a token may go where another one of these lies; where these go, no later one lies
    tl.store(first + target[:, None], held, mask=inside)


@torch.no_grad()
def move_kv_triton(
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    path: Tensor,
    counts: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Arguments as `emssd_compile.ops.move_kv` has them, in any dtype and of any strides.

    A token that would come from outside the cache, or from a slot before the one it goes to, is not moved.

    Raises:
        RuntimeError: shapes do not fit.
    """
    fits = path.dim() == 2 and starts.shape == counts.shape == path.shape[:1]
    fits = fits and all(cache.dim() == 4 for cache in (k_cache, v_cache))
    if block_table is None:
        fits = fits and all(cache.shape[0] == path.shape[0] for cache in (k_cache, v_cache))
    else:
        fits = fits and block_table.shape[:-1] == path.shape[:1] and block_table.dtype == torch.int32
        fits = fits and k_cache.shape[:2] == v_cache.shape[:2]
    if not fits:
        caches = "k_cache and v_cache [B, C, Hkv, D]"
        if block_table is not None:
            caches = "k_cache and v_cache [blocks, P, Hkv, D], block_table int32 [B, M]"
        given = (k_cache, v_cache, starts, path, counts, *(() if block_table is None else (block_table,)))
        raise RuntimeError(
            f"emssd::move_kv: {caches}, starts [B], path [B, N] and counts [B] do not fit: "
            + ", ".join(str(list(tensor.shape)) for tensor in given)
        )
    (_, k_capacity, k_heads, key_size), (_, v_capacity, v_heads, value_size) = k_cache.shape, v_cache.shape
    row_blocks = 1 if block_table is None else block_table.shape[1]
    if path.numel() == 0:
        return
    with torch.cuda.device_of(k_cache):
        _move[path.shape[0], triton.cdiv(max(k_heads * key_size, v_heads * value_size), _BLOCK)](
            k_cache,
            v_cache,
            starts,
            path,
            counts,
            None if block_table is None else block_table.contiguous(),
            k_cache.stride(),
            v_cache.stride(),
            starts.stride(0),
            path.stride(),
            counts.stride(0),
            path.shape[1],
            min(k_capacity, v_capacity) * row_blocks,
            row_blocks,
            KEY_ELEMENTS=k_heads * key_size,
            KEY_SIZE=key_size,
            VALUE_ELEMENTS=v_heads * value_size,
            VALUE_SIZE=value_size,
            MOVES=min(triton.next_power_of_2(path.shape[1]), _MOVES),
            BLOCK=_BLOCK,
            PAGE=k_capacity,
        )
