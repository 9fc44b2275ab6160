"""What an engine is built for, and how."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from emssd_compile.errors import OptionError
from emssd_compile.export.target import option
from emssd_compile.export.tensorrt.library import RUNTIMES


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

    runtime: str = option(
        "--runtime", "auto", choices=("auto", *RUNTIMES), help="auto: the first of these that is installed"
    )
    compute_capabilities: Sequence[str] | None = option(
        "--compute-capability",
        None,
        metavar="X.Y",
        action="append",
        help="GPU to build for, as in 8.9; may be repeated (default: the one that is here)",
    )
    attention: str = option(
        "--attention",
        "fused",
        choices=("fused", "masked", "decomposed"),
        help="decomposed: matrix products and a softmax, which float32 and capped scores need (default: fused)",
    )
    weights: str = option(
        "--weights",
        "in-engine",
        choices=("in-engine", "streamed"),
        help="streamed: fetched when needed, as far as the GPU's memory does not hold them (default: in-engine)",
    )
    version_compatible: bool = option(
        "--version-compatible", False, action="store_true", help="later versions of TensorRT can load it; not with RTX"
    )
    hardware_compatibility: str = option(
        "--hardware-compatibility",
        "none",
        choices=("none", "ampere-plus", "same-compute-capability"),
        help="GPUs besides the one built for; not with RTX (default: none)",
    )
    timing_cache: str | None = option(
        "--timing-cache", None, metavar="FILE", help="read and written: another build measures less; not with RTX"
    )
    profile_per_bucket: bool = option(
        "--profile-per-bucket", False, action="store_true", help="optimise for each captured size; builds longer"
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            value, choices = getattr(self, field.name), field.metadata["argument"].get("choices")
            if choices and value not in choices:
                raise OptionError(f"{field.name}={value!r} is unknown; choose one of {list(choices)}")
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
