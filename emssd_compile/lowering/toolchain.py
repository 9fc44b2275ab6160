"""What compiling takes besides Python: a folder for what is compiled, and a C++ compiler for CPUs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from emssd_compile.errors import BackendError


def require_cache() -> None:
    """Raises BackendError unless Inductor's cache can be written; torch itself wants the folder even to capture."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BackendError(
            f"{folder}, where torch keeps what it compiles, cannot be written: {error.strerror or error}; set the "
            "environment variable TORCHINDUCTOR_CACHE_DIR to a folder that can be"
        ) from error


def require_compiler(device: torch.device) -> None:
    """Raises BackendError if Inductor has no C++ compiler for a CPU."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        wanted = os.environ.get("CXX")
        which = f"CXX={wanted!r} is none that runs" if wanted else "there is no g++"
        raise BackendError(
            f"Inductor compiles C++ for a CPU, and has no compiler: {which}; install g++ or set CXX, or pass "
            'backend="eager", which compiles nothing'
        ) from error


def reason(error: BaseException) -> str:
    """Why Inductor failed, in one line: what a compiler says is wrong rather than the command that it was given."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
