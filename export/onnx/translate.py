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

from emssd_compile.ops import kept_threshold, tiled_attention, update_kv
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
    """Matrix products and a softmax, on the caches as far as the longest row goes.

    The operator `Attention` adds a mask to the scores and multiplies the weights with whatever lies in the cache, and
    neither hides what is not finite. Here hidden scores are replaced, and of slots behind a row's length nothing is
    read: the row's last slot stands for them, which is as cheap, since ONNX Runtime copies the slots in any case. (It
    would read a cache to its end; it copies by `Gather` on several threads, by `Slice` on one.)

    The queries of a group of heads are one matrix. Scores are float32, or float64 for float64 inputs. A query that sees
    nothing gets something, and not zeros.
    """
    if is_causal and mask is not None:
        raise NotImplementedError("a mask besides causal order")
    heads, groups = _sizes(q)[1], _sizes(q)[1] // _sizes(k_cache)[1]
    assert q.dtype is not None
    wide = ir.DataType.DOUBLE if q.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    longest = op.ReduceMax(kv_lengths, keepdims=1)
    keys, values = (_cast(_used_slots(cache, kv_lengths, longest), q.dtype, wide) for cache in (k_cache, v_cache))
    queries: Any = q if groups == 1 else op.Reshape(q, _ints(0, heads // groups, -1, _sizes(q)[3]))
    queries = op.Mul(_cast(queries, q.dtype, wide), _scalar(scale, wide))
    scores = op.MatMul(queries, op.Transpose(keys, perm=[0, 1, 3, 2]))  # [B, Hkv, G * S, L]
    if softcap > 0:
        cap = _scalar(softcap, wide)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    visible = _slots_up_to(kv_lengths, q if is_causal else None, longest, groups)
    if mask is not None:
        seen = _grouped(op.Slice(mask, _ints(0), longest, _ints(3)), _sizes(mask)[1], longest, groups)
        if mask.dtype != ir.DataType.BOOL:
            assert mask.dtype is not None
            scores = op.Add(scores, _cast(seen, mask.dtype, wide))
            seen = op.Greater(seen, _scalar(float(mask.dtype.min) / 2, mask.dtype))
        visible = op.And(visible, seen)
    scores = op.Where(visible, scores, _scalar(float(wide.min), wide))
    if sinks is None:
        weights = op.Softmax(scores, axis=-1)
    else:
        weights = _softmax_with_sinks(scores, op.Cast(sinks, to=wide), q, longest, groups)
    result: TensorType = _cast(op.MatMul(weights, values), wide, q.dtype)
    if groups > 1:
        result = op.Reshape(result, _ints(0, heads, -1, _sizes(v_cache)[3]))
    return result


def _used_slots(cache: TensorType, kv_lengths: TensorType, longest: Any) -> Any:
    """The slots of each row up to the longest row's last, `[B, Hkv, L, D]`, where each row repeats its own last one."""
    rows, heads, capacity, size = _sizes(cache)
    slots = op.Min(_range(longest), op.Unsqueeze(op.Sub(kv_lengths, _int(1)), _ints(1, 2)))  # [B, 1, L]
    starts = op.Constant(value=ir.tensor(torch.arange(rows * heads).view(rows, heads, 1) * capacity))
    return op.Gather(op.Reshape(cache, _ints(-1, size)), op.Add(starts, slots), axis=0)


def _slots_up_to(kv_lengths: TensorType, q: TensorType | None, longest: Any, groups: int) -> Any:
    """Bool `[B, 1, G * S or 1, L]`: slots below the row's length; with right-aligned queries, up to each one's own."""
    last = op.Sub(op.Unsqueeze(kv_lengths, _ints(1)), _int(1))  # [B, 1]
    if q is not None:
        width = op.Shape(q, start=2, end=3)
        behind = op.Sub(op.Add(_range(width), _int(1)), width)  # [S], from 1 - S to 0
        last = op.Add(last, behind)  # [B, S], the slot of each query
        last = op.Concat(*[last] * groups, axis=1)
    return op.LessOrEqual(_range(longest), op.Unsqueeze(last, _ints(1, 3)))


def _grouped(mask: Any, heads: int, longest: Any, groups: int) -> Any:
    """A mask `[B, 1 or Hq, S, L]` for the queries of each group as one matrix, `[B, 1 or Hkv, G * S, L]`."""
    if heads == 1:
        return mask if groups == 1 else op.Concat(*[mask] * groups, axis=2)
    return op.Reshape(mask, op.Concat(_ints(0, heads // groups, -1), longest, axis=0))


def _softmax_with_sinks(scores: Any, sinks: Any, q: TensorType, longest: Any, groups: int) -> Any:
    """Weights of the keys, `[B, Hkv, G * S, L]`, where the sink of each head is one more score."""
    rows, heads = _sizes(q)[:2]
    shape = op.Concat(_ints(rows, heads // groups, groups), op.Shape(q, start=2, end=3), axis=0)
    column = op.Expand(op.Reshape(sinks, _ints(1, heads // groups, groups, 1)), shape)
    column = op.Reshape(column, _ints(rows, heads // groups, -1, 1))
    weights = op.Softmax(op.Concat(scores, column, axis=3), axis=-1)
    return op.Slice(weights, _ints(0), longest, _ints(3))


def _cast(value: Any, dtype: ir.DataType, to: ir.DataType) -> Any:
    return value if dtype == to else op.Cast(value, to=to)


def _scalar(value: float, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def _range(length: Any) -> Any:
    """0, 1, ... for a length `[1]`."""
    return op.Range(_int(0), op.Squeeze(length, _ints(0)), _int(1))


def _kept_threshold(keys: TensorType, weights: TensorType, most: TensorType, share: TensorType) -> TensorType:
    """Sort the rows that cut something off, and only those: of the others the smallest key is kept."""
    size = _int(_sizes(keys)[1])
    cuts = op.Or(op.And(op.Greater(most, _int(0)), op.Less(most, size)), op.Less(share, op.CastLike(_int(1), share)))
    rows = op.Squeeze(op.NonZero(cuts), _ints(0))  # [n]
    keys_there, weights_there, most, share = (op.Gather(given, rows) for given in (keys, weights, most, share))
    ranked, order = op.TopK(keys_there, _ints(_sizes(keys)[1]), axis=1)
    rank = op.Sub(op.Min(op.Where(op.Greater(most, _int(0)), most, size), size), _int(1))  # [n]
    by_rank = op.GreaterOrEqual(ranked, op.GatherElements(ranked, op.Unsqueeze(rank, _ints(1)), axis=1))
    weight = op.Cast(op.GatherElements(weights_there, order, axis=1), to=ir.DataType.DOUBLE)
    through = op.CumSum(op.Where(by_rank, weight, _scalar(0.0, ir.DataType.DOUBLE)), _int(1))  # [n, V]
    total = op.Slice(through, _ints(-1), op.Unsqueeze(size, _ints(0)), _ints(1))
    limit = op.Mul(op.Cast(op.Unsqueeze(share, _ints(1)), to=ir.DataType.DOUBLE), total)
    by_weight = op.Add(_count(op.Less(through, limit)), _int(1))
    count = _count(by_rank)
    count = op.Where(op.Less(share, op.CastLike(_int(1), share)), op.Min(count, by_weight), count)
    last = op.Unsqueeze(op.Max(op.Sub(count, _int(1)), _int(0)), _ints(1))
    found = op.Squeeze(op.GatherElements(ranked, last, axis=1), _ints(1))
    thresholds = op.ScatterElements(op.ReduceMin(keys, _ints(1), keepdims=0), rows, found, axis=0)
    has_nan = op.Greater(_count(op.IsNaN(keys)), _int(0))
    result: TensorType = op.Where(has_nan, _scalar(float("nan"), ir.DataType.FLOAT), thresholds)
    return result


def _count(truths: Any) -> Any:
    """How many of each row are true, `[R]` of `[R, V]`."""
    return op.ReduceSum(op.Cast(truths, to=ir.DataType.INT64), _ints(1), keepdims=0)


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


def _stable_sort(
    self: TensorType, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[TensorType, TensorType]:
    """All elements as the best of so many: of equals, TopK gives the one with the lower index first."""
    before, size, _ = _split(_sizes(self), dim)
    values, indices = op.TopK(self, _ints(size), axis=before, largest=int(descending), sorted=1)
    return values, indices


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


def _where(condition: TensorType, self: TensorType, other: TensorType) -> TensorType:
    """ONNX Runtime chooses between numbers only, not between bools."""
    if self.dtype != ir.DataType.BOOL or other.dtype != ir.DataType.BOOL:
        numbers: TensorType = op.Where(condition, self, other)
        return numbers
    result: TensorType = op.Or(op.And(condition, self), op.And(op.Not(condition), other))
    return result


def _any(self: TensorType) -> TensorType:
    """The exporter takes the largest element, which of nothing is the lowest number, and so true."""
    result: TensorType = op.Cast(op.ReduceSum(_truths(self), keepdims=0), to=ir.DataType.BOOL)
    return result


def _any_in_dim(self: TensorType, dim: int, keepdim: bool = False) -> TensorType:
    """As `_any`, in one dimension."""
    found = op.ReduceSum(_truths(self), _ints(dim), keepdims=int(keepdim))
    result: TensorType = op.Cast(found, to=ir.DataType.BOOL)
    return result


def _truths(value: Any) -> Any:
    """0 or 1 for each element."""
    return op.Cast(_cast(value, value.dtype, ir.DataType.BOOL), to=ir.DataType.INT64)


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
    kept_threshold: _kept_threshold,
    aten.searchsorted.Tensor: _searchsorted,
    aten.sort.stable: _stable_sort,
    aten.cumprod.default: _cumprod,
    aten.where.self: _where,
    aten.any.default: _any,
    aten.any.dim: _any_in_dim,
}
"""For `torch.onnx.export(custom_translation_table=...)`."""
