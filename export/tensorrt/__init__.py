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
from emssd_compile.export.tensorrt.build import require, write
from emssd_compile.export.tensorrt.check_attention import CheckAttention
from emssd_compile.export.tensorrt.decompose import DecomposeAttention
from emssd_compile.export.tensorrt.library import load_runtime
from emssd_compile.export.tensorrt.options import BuildOptions
from emssd_compile.export.tensorrt.runner import open_step
from emssd_compile.passes.fuse_projections import FuseProjections
from emssd_compile.passes.manager import Pass
from emssd_compile.passes.tile_attention import TileAttention
from emssd_compile.runtime.buckets import StepSizes


def passes(sizes: Sequence[StepSizes], options: BuildOptions) -> tuple[Pass, ...]:
    """Few wide products, values for memory, rectangles for packed queries, and attention that there is a kernel for.

    TensorRT's cache layer writes all that it is given (`cut`): each row has slots to spare for the longest inert tail.
    """
    tile = TileAttention(spare_slots=max(sizes[-1]))
    attention = (tile, DecomposeAttention()) if options.attention == "decomposed" else (CheckAttention(), tile)
    return (FuseProjections(), *attention)


def environment(details: dict[str, Any], device: torch.device) -> dict[str, str]:
    """The runtime and its version. The GPU may be one of several: `open_step` compares it.

    Raises:
        ArtifactError: the runtime is not installed.
    """
    runtime = details["runtime"]
    if details["options"]["version_compatible"]:
        return {"runtime": runtime}
    return {"runtime": runtime, f"{runtime} version": load_runtime(runtime).__version__}


TARGET = Target(
    name="tensorrt",
    passes=passes,
    write=write,
    open=open_step,
    environment=environment,
    require=require,
    details={
        "runtime": str,
        "compute_capabilities": list[str],
        "options": {"version_compatible": bool, "hardware_compatibility": str, "weights": str},
        "profiles": list[dict[str, list[list[int]]]],
        "buckets": list[dict[str, int]],
        "results": dict[str, str],
        "caches": dict[str, str],
        "bindings": list[dict[str, Any]],
    },
    options=BuildOptions,
    devices=("cuda",),
)

__all__ = ["TARGET", "BuildOptions"]
