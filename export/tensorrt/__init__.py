"""TensorRT: the step as one engine, for TensorRT and TensorRT-RTX alike.

What TensorRT's parser understands of ONNX is all of the step but its cache updates and its attention. So the step is
cut there (`cut`); what is left goes through torch's ONNX exporter and the parser, and TensorRT's own layers are put in
the gaps (`network`): the cache update takes packed tokens and writes in place, attention takes the length of each row.
(The parser does take ONNX's `TensorScatter` and `Attention`, but not packed updates, and it drops the rows' lengths.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emssd_compile.export.target import Target
from emssd_compile.export.tensorrt.build import write
from emssd_compile.export.tensorrt.library import load_runtime
from emssd_compile.export.tensorrt.options import BuildOptions
from emssd_compile.export.tensorrt.runner import open_step
from emssd_compile.passes.manager import Pass
from emssd_compile.passes.tile_attention import TileAttention
from emssd_compile.runtime.buckets import Sizes


def passes(sizes: Sequence[Sizes]) -> tuple[Pass, ...]:
    """Values for memory, and rectangles for packed queries.

    TensorRT's cache layer writes all that it is given (`cut`): each row has slots to spare for the longest inert tail.
    """
    return (TileAttention(spare_slots=max(sizes[-1])),)


def environment(details: dict[str, Any], device: torch.device) -> dict[str, str]:
    """The runtime and its version, and the compute capability: the list built for, if the device is in it.

    Raises:
        ArtifactError: the runtime is not installed.
    """
    runtime, built_for = details["runtime"], details["compute_capabilities"]
    found = {"runtime": runtime, "compute capability": ", ".join(built_for)}
    options = details["options"]
    if not options["version_compatible"]:
        found[f"{runtime} version"] = load_runtime(runtime).__version__
    if device.type == "cuda" and torch.cuda.is_available() and options["hardware_compatibility"] == "none":
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        if capability not in built_for:
            found["compute capability"] = capability
    return found


TARGET = Target("tensorrt", passes, write, open_step, environment, devices=("cuda",))

__all__ = ["TARGET", "BuildOptions"]
