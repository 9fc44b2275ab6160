"""How ops are written in ONNX for TensorRT's parser: as for ONNX itself, where it understands that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript.onnx_opset import opset24
from onnxscript.onnx_types import TensorType

from emssd_compile.export.onnx.translate import TRANSLATIONS
from emssd_compile.passes.graph import aten

op: Any = opset24  # its stubs know the types of ONNX; what is passed to it here has them only when it is called


def _argmax(self: TensorType, dim: int | None = None, keepdim: bool = False) -> TensorType:
    """TensorRT finds no largest element of a vector, but of a matrix of one row."""
    value: Any = self
    if len(value.shape) > 1:
        result: TensorType = op.ArgMax(self, axis=dim, keepdims=int(keepdim))
        return result
    first = op.Constant(value_ints=[0])
    result = op.Squeeze(op.ArgMax(op.Unsqueeze(self, first), axis=1, keepdims=int(keepdim)), first)
    return result


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {**TRANSLATIONS, aten.argmax.default: _argmax}
"""For `torch.onnx.export(custom_translation_table=...)`."""
