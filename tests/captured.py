"""Capture a model once for all that decodes with it: that takes longer than most of what the tests are about."""

from __future__ import annotations

import functools

from torch import nn

from emssd_compile import compiler
from emssd_compile.compiler import CompiledModel
from emssd_compile.step.batch import BatchShape

_captured = functools.lru_cache(maxsize=8)(compiler.compile_model)


def compile_model(model: nn.Module, batch: BatchShape, taps: tuple[int, ...] = ()) -> CompiledModel:
    """As `compiler.compile_model`, but the model is captured once."""
    compiled = _captured(model, batch)
    return compiled.tapped(taps) if taps else compiled
