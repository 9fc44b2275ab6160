"""The project's ops, in the ``emssd`` namespace: importing this package defines them.

Each op has an eager reference and a fake implementation in Python, so a graph that holds it runs and traces on any
device. `load_kernels` adds the fast forms for a kind of device.
"""

from pathlib import Path

from emssd_compile.files import hash_of_sources
from emssd_compile.ops._ancestors import WORD_BITS, pack_ancestors
from emssd_compile.ops._append_kv import append_kv
from emssd_compile.ops._attention import attention
from emssd_compile.ops._fingerprint import fingerprint
from emssd_compile.ops._grouped_linear import grouped_linear
from emssd_compile.ops._kept_threshold import kept_threshold
from emssd_compile.ops._move_kv import move_kv
from emssd_compile.ops._ragged_attention import ragged_attention
from emssd_compile.ops._tiled_attention import tiled_attention
from emssd_compile.ops._update_kv import update_kv
from emssd_compile.ops.cpu_library import begin_cpu_kernels, cpu_kernel_status, load_cpu_kernels
from emssd_compile.ops.cuda_library import cuda_kernel_status, load_cuda_kernels

__all__ = [
    "WORD_BITS",
    "append_kv",
    "attention",
    "begin_kernels",
    "cpu_kernel_status",
    "cuda_kernel_status",
    "fingerprint",
    "grouped_linear",
    "kept_threshold",
    "kernel_status",
    "load_cpu_kernels",
    "load_cuda_kernels",
    "load_kernels",
    "move_kv",
    "pack_ancestors",
    "ragged_attention",
    "source_hash",
    "tiled_attention",
    "update_kv",
]


def begin_kernels(device_type: str) -> None:
    """Begins in the background what `load_kernels` may have to wait for."""
    if device_type == "cpu":
        begin_cpu_kernels()


def load_kernels(device_type: str) -> bool:
    """Makes the ops use their fast forms on devices of a type ("cpu", "cuda"); `kernel_status` says whether it worked.

    Returns:
        Whether they are in use. If not, the ops work all the same, slowly.
    """
    return {"cpu": load_cpu_kernels, "cuda": load_cuda_kernels}.get(device_type, lambda: False)()


def kernel_status(device_type: str) -> str:
    """One line: the form of the ops in use on devices of a type, or why it is the reference."""
    status = {"cpu": cpu_kernel_status, "cuda": cuda_kernel_status}.get(device_type)
    return status() if status else f"reference: there are no kernels for {device_type}"


def source_hash() -> str:
    """SHA-256 (hex) of every source file of this package: part of any cache key of code that calls the ops."""
    return hash_of_sources(Path(__file__).parent)
