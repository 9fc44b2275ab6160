"""``emssd::ragged_attention`` by the Triton kernels."""

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from emssd_compile.ops._packed_kv import DTYPE, vector_size
from emssd_compile.ops._scores import AttentionAttributes
from emssd_compile.ops.triton.attention_kernel import attend
from emssd_compile.ops.triton.launch import AttentionSizes, LaunchConfig, Processors, block_size, plan_launch
from emssd_compile.ops.triton.merge_kernel import merge_splits
from emssd_compile.ops.triton.packed_kv import is_aligned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute with; float32 in full precision, not as TF32."""
ATTRIBUTES = {"scale", "window", "chunk", "softcap", "alibi_slopes", "sinks"}
"""Of attention, those that the kernels know."""


@torch.no_grad()
def ragged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    ancestors: Tensor | None = None,
    block_table: Tensor | None = None,
    launch: LaunchConfig | None = None,
    **attributes: Any,
) -> Tensor:
    """Arguments and result as `emssd_compile.ops.ragged_attention` has them, in one of `DTYPES` and of any strides.

    Only packed vectors must be lines of bytes. Nothing is read back to the host, and what is allocated and launched
    depends on sizes alone. Values that do not fit (a row that reaches past its cache) cannot be reported from a GPU:
    slots outside the cache are not read.

    Args:
        ancestors, block_table, **attributes: as the op has them; blocks are of a power of two of slots.
        launch: how the work is cut up; None: as `plan_launch` has it.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    rule = AttentionAttributes(**attributes)
    sizes = check_arguments(
        q, k_cache, v_cache, offsets, lengths, positions, rule=rule, ancestors=ancestors, block_table=block_table
    )
    launch = launch or plan_launch(sizes, processors_of(q.device))
    query_shape = (sizes.num_tokens, sizes.num_heads)
    out = q.new_empty(*query_shape, sizes.value_size)
    if out.numel() == 0:
        return out
    splits = launch.num_splits
    partial = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    logsumexp = None if splits == 1 else out.new_empty(splits, *query_shape, dtype=torch.float32)
    score_scale, score_cap = _scale_in_log2(rule)
    sinks = _in_log2(rule.sinks)
    with torch.cuda.device_of(q):
        attend[launch.num_tiles, sizes.num_kv_heads, splits](
            q,
            k_cache,
            v_cache,
            partial,
            logsumexp,
            offsets.contiguous(),
            lengths.contiguous(),
            positions.contiguous(),
            _in_log2(rule.alibi_slopes),
            sinks,
            None if ancestors is None else ancestors.contiguous(),
            None if block_table is None else block_table.contiguous(),
            q.stride(),
            k_cache.stride(),
            v_cache.stride(),
            sizes.num_tokens,
            sizes.num_rows,
            splits,
            sizes.capacity,
            rule.window if rule.window > 0 else None,
            rule.chunk if rule.chunk > 0 else None,
            0 if ancestors is None else ancestors.shape[1],
            0 if block_table is None else block_table.shape[1],
            score_scale,
            score_cap,
            GROUP=sizes.num_heads // sizes.num_kv_heads,
            HEAD_SIZE=sizes.head_size,
            VALUE_SIZE=sizes.value_size,
            BLOCK_ROWS=triton.next_power_of_2(sizes.num_rows + 1),
            BLOCK_QUERIES=launch.block_queries,
            BLOCK_SLOTS=launch.block_slots,
            BLOCK_HEAD=block_size(sizes.head_size),
            BLOCK_VALUE=block_size(sizes.value_size),
            PAGE=1 if block_table is None else k_cache.shape[1],
            ALIGNED=is_aligned(k_cache) and is_aligned(v_cache),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if logsumexp is not None:
            merge_splits[(math.prod(query_shape),)](
                partial,
                logsumexp,
                out,
                sinks,
                offsets[-1:],
                splits,
                NUM_HEADS=sizes.num_heads,
                VALUE_SIZE=sizes.value_size,
                BLOCK_SPLITS=triton.next_power_of_2(splits),
                BLOCK_VALUE=block_size(sizes.value_size),
            )
    return out


def check_arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    rule: AttentionAttributes | None = None,
    ancestors: Tensor | None = None,
    block_table: Tensor | None = None,
) -> AttentionSizes:
    """The sizes of a call whose arguments fit together.

    Raises:
        RuntimeError: they do not.
    """
    fits = q.dim() == 3 and k_cache.dim() == 4 and v_cache.dim() == 4 and q.shape[2] == vector_size(k_cache)
    fits = fits and k_cache.shape[:3] == v_cache.shape[:3] and q.shape[1] % k_cache.shape[2] == 0
    _check(fits, "q [T, Hq, Dk], k_cache [B, C, Hkv, Dk] and v_cache [B, C, Hkv, Dv]", q, k_cache, v_cache)
    (num_tokens, num_heads, head_size), (num_rows, capacity, num_kv_heads) = q.shape, v_cache.shape[:3]
    if block_table is not None:
        page, num_rows = capacity, lengths.shape[0]
        fits = block_table.dim() == 2 and block_table.shape[0] == num_rows and block_table.dtype == torch.int32
        fits = fits and page > 0 and page & (page - 1) == 0
        what = "lengths [B], block_table int32 [B, M] and v_cache [blocks, P, Hkv, Dv], P a power of two,"
        _check(fits, what, lengths, block_table, v_cache)
        capacity = block_table.shape[1] * page
    fits = offsets.shape == (num_rows + 1,) and lengths.shape == (num_rows,) and positions.shape == (num_tokens,)
    _check(fits, "offsets [B + 1], lengths [B] and positions [T]", offsets, lengths, positions)
    for name in ("alibi_slopes", "sinks"):
        values = getattr(rule, name, None)
        if values is not None:
            _check(values.shape == (num_heads,), f"q [T, Hq, Dk] and {name} [Hq]", q, values)
    if ancestors is not None:
        fits = ancestors.dim() == 2 and ancestors.shape[0] == num_tokens and ancestors.dtype == torch.int32
        _check(fits, "q [T, Hq, Dk] and ancestors int32 [T, W]", q, ancestors)
    is_packed = k_cache.stride(3) == v_cache.stride(3) == 1 and k_cache.dtype == DTYPE
    fits = k_cache.dtype == v_cache.dtype and (k_cache.dtype == q.dtype or is_packed) and q.dtype in DTYPES
    what = "q, k_cache and v_cache of one dtype among float32, bfloat16 and float16, or caches of packed vectors,"
    _check(fits, what, q, k_cache, v_cache)
    value_size = vector_size(v_cache)
    return AttentionSizes(num_tokens, num_rows, capacity, num_heads, num_kv_heads, head_size, value_size, q.dtype)


@functools.cache
def processors_of(device: torch.device) -> Processors:
    """Those of the device; for a CPU, where only Triton's interpreter runs the kernels, one like an H100's."""
    if device.type != "cuda":
        return Processors(1, 227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    shared_memory: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # in no stub yet
    return Processors(properties.multi_processor_count, shared_memory)


def _check(fits: bool, what: str, *tensors: Tensor) -> None:
    if not fits:
        found = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"emssd::ragged_attention: {what} do not fit: {found}")


def _scale_in_log2(rule: AttentionAttributes) -> tuple[float, float | None]:
    """What to multiply dot products with, and the cap of the result, for scores whose power of 2 is the weight."""
    if rule.softcap > 0:
        return rule.scale / rule.softcap, rule.softcap * math.log2(math.e)
    return rule.scale * math.log2(math.e), None


def _in_log2(values: Tensor | None) -> Tensor | None:
    """What is added to scores, for such scores."""
    return None if values is None else values.float().contiguous() * math.log2(math.e)
