"""What an engine is built for, and how."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from emssd_compile.errors import OptionError

_CHOICES = {
    "attention": ("fused", "masked", "decomposed"),
    "weights": ("in-engine", "streamed"),
    "hardware_compatibility": ("none", "ampere-plus", "same-compute-capability"),
}


@dataclass(frozen=True)
class BuildOptions:
    """Options of the TensorRT target.

    Attributes:
        runtime: `"tensorrt"`, `"tensorrt-rtx"`, or `"auto"`: the first of these that is installed.
        compute_capabilities: of the GPUs to build for, as in `("8.0", "8.9")`. Default: that of the GPU that is here.
            TensorRT-RTX needs none; TensorRT can build for no other.
        attention: `"fused"`: one kernel, in float16 or bfloat16. `"masked"`: the same, told by a mask what is causal,
            too. `"decomposed"`: matrix products and a softmax, in any dtype; also for models that cap scores.
        weights: `"in-engine"`; `"streamed"`: on the GPU only as far as its memory goes, else fetched when needed.
        version_compatible: later versions of TensorRT can load the engine, too; not with TensorRT-RTX.
        hardware_compatibility: GPUs besides the one built for: `"none"`, `"ampere-plus"` or
            `"same-compute-capability"`; not with TensorRT-RTX, which takes `compute_capabilities`.
        timing_cache: a file that is read, if it is there, and written: another build measures less. Not with
            TensorRT-RTX, which measures nothing while it builds.
        profile_per_bucket: optimise for each captured size by itself; builds longer, and makes larger engines.

    Raises:
        OptionError: a value is unknown, or the runtime cannot do it.
    """

    runtime: str = "auto"
    compute_capabilities: Sequence[str] | None = None
    attention: str = "fused"
    weights: str = "in-engine"
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    timing_cache: str | None = None
    profile_per_bucket: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(choices)}")
        if isinstance(self.compute_capabilities, str):
            raise OptionError(f"compute_capabilities must be a list, as in [{self.compute_capabilities!r}]")
        if self.timing_cache is not None and not Path(self.timing_cache).parent.is_dir():
            raise OptionError(f"timing_cache={str(self.timing_cache)!r}: there is no such folder to write it to")

    def check(self, runtime: str) -> None:
        """Raises OptionError for what a runtime cannot do."""
        is_rtx = runtime == "tensorrt-rtx"
        only_full = {
            "version_compatible": self.version_compatible,
            "hardware_compatibility": self.hardware_compatibility != "none",
            "timing_cache": self.timing_cache is not None,
        }
        refused = [name for name, is_set in only_full.items() if is_set and is_rtx]
        if refused:
            raise OptionError(f"TensorRT-RTX has no {', '.join(refused)}: leave it out, or pass runtime='tensorrt'")

    def capabilities(self, known: Collection[str]) -> tuple[str, ...]:
        """Compute capabilities to build for, by default that of the GPU that is here.

        Args:
            known: those that the runtime can build for; empty if it builds for the GPU that is here only.

        Raises:
            OptionError: one is unknown, or there is no GPU to build for.
        """
        here = ["{}.{}".format(*torch.cuda.get_device_capability())] if torch.cuda.is_available() else []
        wanted = here if self.compute_capabilities is None else list(self.compute_capabilities)
        if wanted and set(wanted) <= set(known or here):
            return tuple(wanted)
        if known:
            raise OptionError(f"compute_capabilities must be of {sorted(known)} for TensorRT-RTX, and not {wanted}")
        raise OptionError(
            f"TensorRT builds engines for the GPU that is here, which is {here or 'none'}, not for {wanted}: export on "
            "a machine that has one and widen it by hardware_compatibility, or pass runtime='tensorrt-rtx'"
        )
