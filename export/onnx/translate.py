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
    sinks: TensorType | None = None,
    is_causal: bool,
) -> TensorType:
    """`Attention` on the caches as far as the longest row goes, with the heads of a group behind one another.

    What lies behind the longest row is masked by `nonpad_kv_seqlen` in any case, but ONNX Runtime computes with it all
    the same; it cuts by `Gather` on several threads, by `Slice` on one. And it multiplies matrices for each query head,
    where the queries of a group can be one matrix.

    Causal order is said by a bias, which is computed once for all layers. The attribute for it has not always meant the
    same: that a row's last query is at the last of its keys (onnx/onnx#8068) is younger than the operator. A query that
    sees nothing gets something finite, and not zeros.
    """
    if is_causal and mask is not None:
        raise NotImplementedError("a mask besides causal order")
    if sinks is not None:
        raise NotImplementedError("attention sinks")
    heads, groups = _sizes(q)[1], _sizes(q)[1] // _sizes(k_cache)[1]
    longest = op.ReduceMax(kv_lengths, keepdims=1)
    keys, values = (op.Gather(cache, _range(longest), axis=2) for cache in (k_cache, v_cache))
    bias: Any = None
    if is_causal:
        bias = _causal_bias(q, kv_lengths, longest, groups)
    elif mask is not None:
        bias = _mask_bias(q, mask, longest, groups)
    queries: Any = q if groups == 1 else op.Reshape(q, _ints(0, heads // groups, -1, _sizes(q)[3]))
    result: TensorType = op.Attention(
        queries, keys, values, bias, None, None, kv_lengths, scale=scale, softcap=softcap
    )[0]
    if groups > 1:
        result = op.Reshape(result, _ints(0, heads, -1, _sizes(v_cache)[3]))
    return result


def _causal_bias(q: TensorType, kv_lengths: TensorType, longest: Any, groups: int) -> Any:
    """What is added to the scores of right-aligned queries: `[B, 1, G * S, L]`."""
    width = op.Shape(q, start=2, end=3)
    last = op.Add(op.Sub(op.Unsqueeze(kv_lengths, _ints(1)), width), _range(width))  # [B, S], the slot of each query
    last = op.Unsqueeze(op.Concat(*[last] * groups, axis=1), _ints(1, 3))
    return _bias(op.LessOrEqual(_range(longest), last), q)


def _mask_bias(q: TensorType, mask: TensorType, longest: Any, groups: int) -> Any:
    """A mask `[B, 1 or Hq, S, C + 1]`, bool or additive, as what is added to the scores `[B, Hkv, G * S, L]`."""
    bias = op.Slice(mask, _ints(0), longest, _ints(3))
    if mask.dtype == ir.DataType.BOOL:
        bias = _bias(bias, q)
    if _sizes(mask)[1] == 1:
        return bias if groups == 1 else op.Concat(*[bias] * groups, axis=2)
    shape = op.Concat(_ints(0, _sizes(mask)[1] // groups, -1), longest, axis=0)
    return op.Reshape(bias, shape)


def _bias(visible: Any, q: TensorType) -> Any:
    """Nothing is added to the scores of what is visible. Half of the lowest number: with a score it is still finite."""
    dtype = q.dtype
    assert dtype is not None
    zero, least = (op.CastLike(op.Constant(value_float=float(value)), q) for value in (0, dtype.min / 2))
    return op.Where(visible, zero, least)


def _range(length: Any) -> Any:
    """0, 1, ... for a length `[1]`."""
    return op.Range(_int(0), op.Squeeze(length, _ints(0)), _int(1))


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
