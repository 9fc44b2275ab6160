"""How ops are written in ONNX for TensorRT's parser: as for ONNX itself, where it understands that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.onnx_opset import opset24
from onnxscript.onnx_types import TensorType

from emssd_compile.export.onnx.translate import TRANSLATIONS
from emssd_compile.ops import kept_threshold
from emssd_compile.passes.graph import aten

op: Any = opset24  # its stubs know the types of ONNX; what is passed to it here has them only when it is called

_FARTHEST = 90.0  # the logarithm of more than float32 holds
_PARTS, _DIVISIONS = 16, 8  # what is left of the interval is less than float32 tells apart


def _argmax(self: TensorType, dim: int | None = None, keepdim: bool = False) -> TensorType:
    """TensorRT finds no largest element of a vector, but of a matrix of one row."""
    value: Any = self
    if len(value.shape) > 1:
        result: TensorType = op.ArgMax(self, axis=dim, keepdims=int(keepdim))
        return result
    first = op.Constant(value_ints=[0])
    result = op.Squeeze(op.ArgMax(op.Unsqueeze(self, first), axis=1, keepdims=int(keepdim)), first)
    return result


def _kept_threshold(keys: TensorType, weights: TensorType, most: TensorType, share: TensorType) -> TensorType:
    """By division of intervals, since TensorRT ranks a few thousand keys at most, and has no float64.

    Keys that differ by no more than a few units in the last place count as equal.
    """
    bounds = _Bounds.of(keys)
    count = op.Cast(op.Unsqueeze(most, _ints(1)), to=ir.DataType.FLOAT)  # [R, 1]
    count = op.Where(op.Greater(count, _number(0)), count, _number(float("inf")))
    by_rank = _smallest_kept(keys, op.Constant(value=ir.tensor([[1.0]], dtype=ir.DataType.FLOAT)), count, bounds)
    zero = _number(0)
    weighed = op.Where(op.GreaterOrEqual(keys, by_rank), weights, zero)
    share = op.Unsqueeze(share, _ints(1))
    limit = op.Mul(share, op.ReduceSum(weighed, _ints(1)))
    by_weight = op.Max(by_rank, _smallest_kept(keys, weighed, limit, bounds))
    found = op.Where(op.Less(share, _number(1)), by_weight, by_rank)
    has_nan = op.Greater(op.ReduceSum(op.Cast(op.IsNaN(keys), to=ir.DataType.FLOAT), _ints(1)), zero)
    result: TensorType = op.Squeeze(op.Where(has_nan, _number(float("nan")), found), _ints(1))
    return result


@dataclass(frozen=True)
class _Bounds:
    """The smallest and the largest key of each row, `[R, 1]`."""

    least: Any
    most: Any

    @classmethod
    def of(cls, keys: Any) -> _Bounds:
        return cls(op.ReduceMin(keys, _ints(1)), op.ReduceMax(keys, _ints(1)))


def _smallest_kept(keys: Any, weights: Any, limit: Any, bounds: _Bounds) -> Any:
    """`[R, 1]`: the smallest key of each row above which less than a limit lies, or the largest of all.

    It lies in an interval that is divided again and again: one of logarithms, since keys may be of any size.
    """
    low, high = _number(-_FARTHEST), _logarithm(bounds.most)
    fractions = op.Constant(value=ir.tensor([[part / _PARTS for part in range(1, _PARTS)]], dtype=ir.DataType.FLOAT))
    for _ in range(_DIVISIONS):
        pivots = op.Add(low, op.Mul(op.Sub(high, low), fractions))  # [R, parts - 1], ascending
        is_kept = _weighs_less(keys, weights, _exponential(pivots), limit)  # those from one pivot on
        low = op.Max(low, op.ReduceMax(op.Where(is_kept, low, pivots), _ints(1)))
        high = op.Min(high, op.ReduceMin(op.Where(is_kept, pivots, high), _ints(1)))
    beyond = op.Greater(keys, _exponential(low))
    found = op.ReduceMin(op.Where(beyond, keys, _number(float("inf"))), _ints(1))
    return op.Where(_weighs_less(keys, weights, bounds.least, limit), bounds.least, op.Min(found, bounds.most))


def _weighs_less(keys: Any, weights: Any, pivots: Any, limit: Any) -> Any:
    """Bool `[R, n]`: whether the keys `[R, V]` above each of `pivots[R, n]` weigh less than `limit[R, 1]`."""
    above = op.Greater(op.Unsqueeze(keys, _ints(2)), op.Unsqueeze(pivots, _ints(1)))  # [R, V, n]
    weight = op.Where(above, op.Unsqueeze(weights, _ints(2)), _number(0))
    return op.Less(op.ReduceSum(weight, _ints(1), keepdims=0), limit)


def _logarithm(value: Any) -> Any:
    """`sign(x) * log(|x| + 1)`."""
    found = op.Mul(op.Sign(value), op.Log(op.Add(op.Abs(value), _number(1))))
    return op.Min(found, _number(_FARTHEST))


def _exponential(value: Any) -> Any:
    """The inverse of `_logarithm`."""
    return op.Mul(op.Sign(value), op.Sub(op.Exp(op.Abs(value)), _number(1)))


def _number(value: float) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType.FLOAT))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    **TRANSLATIONS,
    aten.argmax.default: _argmax,
    kept_threshold: _kept_threshold,
}
"""For `torch.onnx.export(custom_translation_table=...)`."""
