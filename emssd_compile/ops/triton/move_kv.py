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
    k_cache_strides,
    v_cache_strides,
    start_stride,
    path_strides,
    count_stride,
    num_nodes,
    capacity,
    KEY_ELEMENTS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_ELEMENTS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
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
        _copy(k_cache, k_cache_strides, row, start + node, start + depth, moves, element, KEY_ELEMENTS, KEY_SIZE)
        _copy(v_cache, v_cache_strides, row, start + node, start + depth, moves, element, VALUE_ELEMENTS, VALUE_SIZE)


@triton.jit
def _copy(cache, strides, row, source, target, moves, element, ELEMENTS: tl.constexpr, SIZE: tl.constexpr):
    head, dim = element // SIZE, element % SIZE
    inside = moves[:, None] & (element < ELEMENTS)[None, :]
    place = cache + row * strides[0] + (head * strides[2] + dim * strides[3])[None, :]
    held = tl.load(place + source[:, None] * strides[1], mask=inside)
    tl.debug_barrier()  # a token may go where another one of these lies; where these go, no later one lies
    tl.store(place + target[:, None] * strides[1], held, mask=inside)


@torch.no_grad()
def move_kv_triton(k_cache: Tensor, v_cache: Tensor, starts: Tensor, path: Tensor, counts: Tensor) -> None:
    """Arguments as `emssd_compile.ops.move_kv` has them, in any dtype and of any strides.

    A token that would come from outside the cache, or from a slot before the one it goes to, is not moved.

    Raises:
        RuntimeError: shapes do not fit.
    """
    fits = path.dim() == 2 and starts.shape == counts.shape == path.shape[:1]
    fits = fits and all(cache.dim() == 4 and cache.shape[0] == path.shape[0] for cache in (k_cache, v_cache))
    if not fits:
        raise RuntimeError(
            "emssd::move_kv: k_cache and v_cache [B, C, Hkv, D], starts [B], path [B, N] and counts [B] do not fit: "
            + ", ".join(str(list(tensor.shape)) for tensor in (k_cache, v_cache, starts, path, counts))
        )
    (_, k_capacity, k_heads, key_size), (_, v_capacity, v_heads, value_size) = k_cache.shape, v_cache.shape
    if path.numel() == 0:
        return
    with torch.cuda.device_of(k_cache):
        _move[path.shape[0], triton.cdiv(max(k_heads * key_size, v_heads * value_size), _BLOCK)](
            k_cache,
            v_cache,
            starts,
            path,
            counts,
            k_cache.stride(),
            v_cache.stride(),
            starts.stride(0),
            path.stride(),
            counts.stride(0),
            path.shape[1],
            min(k_capacity, v_capacity),
            KEY_ELEMENTS=k_heads * key_size,
            KEY_SIZE=key_size,
            VALUE_ELEMENTS=v_heads * value_size,
            VALUE_SIZE=value_size,
            MOVES=min(triton.next_power_of_2(path.shape[1]), _MOVES),
            BLOCK=_BLOCK,
        )
