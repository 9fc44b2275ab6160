"""Ops that torch's exporter does not know, written in standard ONNX operators.

The exporter calls these functions with the values that an op takes; what they call is recorded. Their annotations tell
it which parameters are values (`TensorType`) and which are attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset24
from onnxscript.onnx_types import TensorType

from emssd_compile.ops import tiled_attention, update_kv
from emssd_compile.passes.graph import aten

op: Any = opset24  # its stubs know the types of ONNX; what is passed to it here has them only when it is called


def _update_kv(
    cache: TensorType,
    new: TensorType,
    row_ids: TensorType,
    slots: TensorType,
    offsets: TensorType,
    lengths: TensorType,
) -> TensorType:
    """Scatter `new[t, h]` to `cache[row, h, slot]`. The indices are the same in all layers, and computed once."""
    rows, heads, capacity, _ = _sizes(cache)
    slot = op.Where(op.Less(row_ids, _int(rows)), slots, _int(capacity - 1))
    places = (op.Min(row_ids, _int(rows - 1)), [1, 2]), (_ints(*range(heads)), [0, 2]), (slot, [1, 2])
    shape = op.Concat(op.Shape(row_ids), _ints(heads, 1), axis=0)
    index = op.Concat(*(op.Expand(op.Unsqueeze(place, _ints(*axes)), shape) for place, axes in places), axis=2)
    result: TensorType = op.ScatterND(cache, index, new)
    return result


def _tiled_attention(
    q: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    kv_lengths: TensorType,
    mask: TensorType | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    is_causal: bool,
) -> TensorType:
    """`Attention` on the caches as far as the longest row goes.

    What lies behind is masked by `nonpad_kv_seqlen` in any case, but ONNX Runtime computes with it all the same: with a
    cache of 1024 tokens and rows of 300, attention takes a fifth of the time on what is cut off here, the cutting
    included.
    """
    longest = op.ReduceMax(kv_lengths, keepdims=1)
    k_cache, v_cache = (op.Slice(cache, _ints(0), longest, _ints(2)) for cache in (k_cache, v_cache))
    if mask is not None:
        mask = op.Slice(mask, _ints(0), longest, _ints(3))
    result: TensorType = op.Attention(
        q, k_cache, v_cache, mask, None, None, kv_lengths, is_causal=int(is_causal), scale=scale, softcap=softcap
    )[0]
    return result


def _searchsorted(
    sorted_sequence: TensorType,
    self: TensorType,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: TensorType | None = None,
) -> TensorType:
    """How many elements of a sorted vector lie before each value: by comparing all, since they are as few as rows."""
    if len(_sizes(sorted_sequence)) != 1 or sorter is not None:
        raise NotImplementedError("searchsorted in several sequences, or with a sorter")
    compare = op.LessOrEqual if right or side == "right" else op.Less
    is_before = compare(sorted_sequence, op.Unsqueeze(self, _ints(-1)))
    dtype = ir.DataType.INT32 if out_int32 else ir.DataType.INT64
    result: TensorType = op.ReduceSum(op.Cast(is_before, to=dtype), _ints(-1), keepdims=0)
    return result


def _cumprod(self: TensorType, dim: int, *, dtype: int = -1) -> TensorType:
    """Products of all elements up to each: quadratic in the size, which is a draft's length."""
    values: Any = self if dtype == -1 else op.Cast(self, to=dtype)
    before, size, behind = _split(_sizes(self), dim)
    among = torch.ones(size, size, dtype=torch.bool).tril().view(size, size, *[1] * behind)
    factors = op.Where(
        op.Constant(value=ir.tensor(among)), op.Unsqueeze(values, _ints(before)), op.CastLike(_int(1), values)
    )
    result: TensorType = op.ReduceProd(factors, _ints(before + 1), keepdims=0)
    return result


def _int(value: int) -> Any:
    return op.Constant(value_int=value)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _split(sizes: list[int], dim: int) -> tuple[int, int, int]:
    """How many dimensions lie before one, its size, and how many lie behind it."""
    before = dim % len(sizes)
    return before, sizes[before], len(sizes) - before - 1


def _sizes(value: Any) -> list[int]:
    """Shape of a value; sizes that are symbolic are not integers."""
    return [*value.shape]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    update_kv: _update_kv,
    tiled_attention: _tiled_attention,
    aten.searchsorted.Tensor: _searchsorted,
    aten.cumprod.default: _cumprod,
}
"""For `torch.onnx.export(custom_translation_table=...)`."""
