"""Options of `optimize`, checked where they are made."""

from __future__ import annotations

from dataclasses import dataclass

from emssd_compile.errors import OptionError
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import BACKENDS


@dataclass(frozen=True)
class CompileOptions:
    """Sizes and choices that are fixed when a model is compiled.

    Attributes:
        max_batch: B, rows of KV cache; more prompts than rows are queued.
        max_length: C, tokens a row can hold, prompt and output together.
        backend: `"eager"` or `"inductor"`.
        layout: `"packed"`, `"padded"` or `"auto"` (see `layouts`).
        prefill_chunk: most packed tokens of a step; longer prompts are read in chunks.
    """

    max_batch: int
    max_length: int
    backend: str = "inductor"
    layout: str = "auto"
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "prefill_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r} must be an integer of at least 1")
        if self.max_length < 2:
            raise OptionError("max_length=1 leaves no room for an output token; use at least 2")
        if self.backend not in BACKENDS:
            raise OptionError(f"unknown backend {self.backend!r}; choose one of {list(BACKENDS)}")
        if self.layout not in LAYOUTS:
            raise OptionError(f"unknown layout {self.layout!r}; choose one of {list(LAYOUTS)}")
