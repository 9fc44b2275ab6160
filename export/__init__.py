"""Export: from the step graph to a folder that decodes without the model's Python code.

Each target is a folder here with a `TARGET` (see `target`); to add one, name it in `TARGETS`.
"""

from __future__ import annotations

import importlib

from emssd_compile.errors import OptionError
from emssd_compile.export.opening import LoadedGraph, open_graph
from emssd_compile.export.target import Target
from emssd_compile.export.tokenizer import load_tokenizer

TARGETS = ("onnx", "tensorrt", "aot")


def find_target(name: str) -> Target:
    """The target of that name. Raises OptionError if there is none."""
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}; choose one of {list(TARGETS)}")
    target: Target = importlib.import_module(f"{__name__}.{name}").TARGET  # brings its own libraries: only when used
    return target


__all__ = ["TARGETS", "LoadedGraph", "Target", "find_target", "load_tokenizer", "open_graph"]
