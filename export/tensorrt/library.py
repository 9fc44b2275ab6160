"""Which TensorRT is here, and what it has to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.export.installed import load_library

RUNTIMES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Module of each runtime by name: TensorRT for data centres, and TensorRT-RTX; their Python interface is the same."""


def find_runtime(runtime: str = "auto") -> str:
    """The name of a runtime that is installed: the one asked for, or with `"auto"` the first in `RUNTIMES`.

    Raises:
        OptionError: there is no runtime of that name.
        ArtifactError: it is not installed; says how to install it.
    """
    if runtime != "auto" and runtime not in RUNTIMES:
        raise OptionError(f"runtime={runtime!r} is unknown; choose 'auto' or one of {list(RUNTIMES)}")
    wanted = list(RUNTIMES) if runtime == "auto" else [runtime]
    failures = []
    for name in wanted:
        try:
            load_library(RUNTIMES[name], extra=name)
        except ArtifactError as error:
            failures.append(str(error))
        else:
            return name
    raise ArtifactError("; or ".join(failures))


def load_runtime(runtime: str) -> Any:
    """The Python module of a runtime. Raises as `find_runtime`, and ArtifactError if it is too old."""
    name = find_runtime(runtime)
    trt = load_library(RUNTIMES[name], extra=name)
    if not hasattr(trt, "IKVCacheUpdateLayer") or not hasattr(trt.IKVCacheUpdateLayer, "update_lengths"):
        raise ArtifactError(
            f"{runtime} {trt.__version__} is too old: 11 of TensorRT, or 1.7 of TensorRT-RTX, is needed"
        )
    return trt


def check_capability(built_for: Sequence[str], device: torch.device, otherwise: str) -> None:
    """Raises ArtifactError if an engine for GPUs of some compute capabilities does not run on a device."""
    here = "{}.{}".format(*torch.cuda.get_device_capability(device))
    if here not in built_for:
        raise ArtifactError(
            f"the engine is for compute capability {', '.join(built_for)}, here it is {here}: {otherwise}"
        )


def make_log(trt: Any) -> Any:
    """A logger of the runtime that keeps its errors, oldest first, in `errors`, and shows nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]  # known when this runs
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a GPU each error is followed by another, that CUDA cannot be asked about it.
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and "catchCudaError" not in message:
                self.errors.append(" ".join(message.split()))

        def explain(self) -> str:
            """What went wrong, the last errors in full."""
            return "; ".join(self.errors[-3:]) or "it gave no reason"

    return Log()
