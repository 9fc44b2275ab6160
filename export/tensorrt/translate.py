"""Ops that torch's ONNX exporter does not know, or writes in a form that TensorRT's parser refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18

from emssd_compile.passes.graph import aten

op: Any = opset18  # its annotations take tensors only where its functions take Python numbers, too


def _searchsorted(
    sorted_sequence: Any,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """How many elements of a sorted vector come before each value."""
    if len(sorted_sequence.shape) != 1 or sorter is not None or out_int32:
        raise NotImplementedError("searchsorted in several sequences, with a sorter, or in int32")
    values = op.Unsqueeze(values, [-1])
    before = op.LessOrEqual(sorted_sequence, values) if right or side == "right" else op.Less(sorted_sequence, values)
    return op.ReduceSum(op.Cast(before, to=ir.DataType.INT64), [-1], keepdims=0)


def _cumprod(self: Any, dim: int, *, dtype: int = -1) -> Any:
    """The products of all prefixes of the last dimension, as those of the rows of a triangle."""
    assert dim % len(self.shape) == len(self.shape) - 1, "the step multiplies along the last dimension only"
    prefix = op.Constant(value=ir.tensor(np.tril(np.ones((self.shape[-1], self.shape[-1]), dtype=bool))))
    one = op.CastLike(op.Constant(value_int=1), self)
    return op.ReduceProd(op.Where(prefix, op.Unsqueeze(self, [-2]), one), [-1], keepdims=0)


def _argmax(self: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """TensorRT takes no vectors here."""
    if len(self.shape) > 1:
        return op.ArgMax(self, axis=dim, keepdims=int(keepdim))
    place = op.ArgMax(op.Unsqueeze(self, [0]), axis=1, keepdims=int(keepdim))
    return op.Squeeze(place, [0])


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.argmax.default: _argmax,
    aten.cumprod.default: _cumprod,
    aten.searchsorted.Tensor: _searchsorted,
}
