"""ONNX: the step as one model of standard operators, run by ONNX Runtime or by whatever else reads the format."""

from __future__ import annotations

import torch

from emssd_compile.export.onnx.exporter import require_exporter
from emssd_compile.export.onnx.model import ModelOptions, environment, passes, write_model
from emssd_compile.export.onnx.session import load_runtime, open_session
from emssd_compile.export.target import Target


def require(options: ModelOptions, device: torch.device, runs: bool) -> None:
    """Raises ArtifactError if what writes ONNX, or what runs it on a device, is not installed."""
    require_exporter("onnx")
    if runs:
        load_runtime(device)


TARGET = Target(
    name="onnx",
    passes=passes,
    write=write_model,
    open=open_session,
    environment=environment,
    require=require,
    details={"in_place": dict[str, str]},
    options=ModelOptions,
    is_captured=False,  # a session waits for its own stream
)

__all__ = ["TARGET", "ModelOptions"]
