"""The project's ops, in the ``emssd`` namespace: importing this package defines them.

Each op has an eager reference and a fake implementation in Python, so a graph that holds it runs and traces on any
device. `load_cpu_kernels` adds the fast CPU forms.
"""

import hashlib
from pathlib import Path

from emssd_compile.ops._append_kv import append_kv
from emssd_compile.ops._attention import attention
from emssd_compile.ops._packed_linear import packed_linear
from emssd_compile.ops._ragged_attention import ragged_attention
from emssd_compile.ops.cpu_library import cpu_kernel_status, load_cpu_kernels

__all__ = [
    "append_kv",
    "attention",
    "cpu_kernel_status",
    "load_cpu_kernels",
    "packed_linear",
    "ragged_attention",
    "source_hash",
]


def source_hash() -> str:
    """SHA-256 (hex) of every source file of this package: part of any cache key of code that calls the ops."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp"), *folder.rglob("*.h")]):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
