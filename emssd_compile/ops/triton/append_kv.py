"""``emssd::append_kv`` by one Triton kernel for keys and values together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emssd_compile.ops._packed_kv import DTYPE, vector_size
from emssd_compile.ops.triton.launch import block_size
from emssd_compile.ops.triton.packed_kv import store_packed

_BLOCK = 1024  # elements of a token that one program copies


@triton.jit
def _append(
    k_cache,
    v_cache,
    k,
    v,
    row_ids,
    slots,
    k_cache_strides,
    v_cache_strides,
    k_strides,
    v_strides,
    row_stride,
    slot_stride,
    num_rows,
    capacity,
    KEY_ELEMENTS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_ELEMENTS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One token: BLOCK elements of its keys and as many of its values, or, to be packed, a vector of each."""
    token = tl.program_id(0).to(tl.int64)
    row, slot = tl.load(row_ids + token * row_stride), tl.load(slots + token * slot_stride)
    # What a GPU cannot report must at least not reach another row's slots.
    if (row < 0) | (row >= num_rows) | (slot < 0) | (slot >= capacity):
        return
    if PACKED:
        head = tl.program_id(1)
        _pack(k_cache, k_cache_strides, k, k_strides, token, row, slot, head, KEY_SIZE, BLOCK)
        _pack(v_cache, v_cache_strides, v, v_strides, token, row, slot, head, VALUE_SIZE, BLOCK)
    else:
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        _copy(k_cache, k_cache_strides, k, k_strides, token, row, slot, element, KEY_ELEMENTS, KEY_SIZE)
        _copy(v_cache, v_cache_strides, v, v_strides, token, row, slot, element, VALUE_ELEMENTS, VALUE_SIZE)


@triton.jit
def _copy(cache, cache_strides, new, strides, token, row, slot, element, ELEMENTS: tl.constexpr, SIZE: tl.constexpr):
    head, dim = element // SIZE, element % SIZE
    inside = element < ELEMENTS
    source = new + token * strides[0] + head * strides[1] + dim * strides[2]
    target = cache + row * cache_strides[0] + slot * cache_strides[1] + head * cache_strides[2] + dim * cache_strides[3]
    tl.store(target, tl.load(source, mask=inside), mask=inside)


@triton.jit
def _pack(cache, cache_strides, new, strides, token, row, slot, head, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    source = new + token * strides[0] + head * strides[1] + dims * strides[2]
    line = cache + row * cache_strides[0] + slot * cache_strides[1] + head * cache_strides[2]
    store_packed(line, tl.load(source, mask=dims < SIZE, other=0.0), SIZE, BLOCK)


@torch.no_grad()
def append_kv_triton(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, row_ids: Tensor, slots: Tensor) -> None:
    """Arguments as `emssd_compile.ops.append_kv` has them, in any dtype and of any strides.

    Only packed vectors must be lines of bytes. A token whose row or slot lies outside the cache writes nothing; only
    row B, an inert token, is meant to.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    _check(k_cache, k, row_ids, slots, "k")
    _check(v_cache, v, row_ids, slots, "v")
    for dim, what in ((0, "rows"), (2, "heads")):
        if k_cache.shape[dim] != v_cache.shape[dim]:
            found = f"k_cache has {k_cache.shape[dim]} {what}, v_cache {v_cache.shape[dim]}"
            raise RuntimeError(f"emssd::append_kv: {found}")
    num_heads, key_size, value_size = *k.shape[1:], v.shape[2]
    elements, is_packed = num_heads * max(key_size, value_size), k_cache.dtype == DTYPE
    block = block_size(max(key_size, value_size)) if is_packed else _BLOCK
    if row_ids.numel() == 0:
        return
    with torch.cuda.device_of(k_cache):
        _append[row_ids.numel(), num_heads if is_packed else triton.cdiv(elements, block)](
            k_cache,
            v_cache,
            k,
            v,
            row_ids,
            slots,
            k_cache.stride(),
            v_cache.stride(),
            k.stride(),
            v.stride(),
            row_ids.stride(0),
            slots.stride(0),
            k_cache.shape[0],
            min(k_cache.shape[1], v_cache.shape[1]),
            KEY_ELEMENTS=num_heads * key_size,
            KEY_SIZE=key_size,
            VALUE_ELEMENTS=num_heads * value_size,
            VALUE_SIZE=value_size,
            BLOCK=block,
            PACKED=is_packed,
        )


def _check(cache: Tensor, new: Tensor, row_ids: Tensor, slots: Tensor, name: str) -> None:
    is_packed = cache.dtype == DTYPE and cache.stride()[-1:] == (1,)
    fits = cache.dim() == 4 and new.shape == (row_ids.numel(), cache.shape[2], vector_size(cache))
    if not fits or slots.shape != row_ids.shape or (cache.dtype != new.dtype and not is_packed):
        raise RuntimeError(
            f"emssd::append_kv: {name}_cache [B, C, Hkv, D], {name} [T, Hkv, D], row_ids [T] and slots [T] do not fit: "
            f"{cache.dtype} {list(cache.shape)}, {new.dtype} {list(new.shape)}, {list(row_ids.shape)}, "
            f"{list(slots.shape)}"
        )
