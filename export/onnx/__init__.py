"""ONNX: the step as one model of standard operators, run by ONNX Runtime or by whatever else reads the format."""

from __future__ import annotations

from emssd_compile.export.onnx.model import environment, passes, write_model
from emssd_compile.export.onnx.session import open_session
from emssd_compile.export.target import Target

TARGET = Target(
    name="onnx",
    passes=passes,
    write=write_model,
    open=open_session,
    environment=environment,
    is_captured=False,  # the session runs on a stream of its own, and waits for it
)

__all__ = ["TARGET"]
