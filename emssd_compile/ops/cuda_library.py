"""Makes the ops use their CUDA forms, which need Triton; it comes with PyTorch's CUDA wheels for Linux.

Where that is impossible, or ``EMSSD_CUDA_KERNELS=0`` is set, the ops keep their eager references and
`cuda_kernel_status` says why.
"""

import functools
import logging
import os

import torch

_logger = logging.getLogger(__name__)
_MIN_CAPABILITY = (8, 0)  # the first with bfloat16 on tensor cores


def load_cuda_kernels() -> bool:
    """Makes the ops use their CUDA forms on CUDA tensors. Triton compiles each at its first call, for a few seconds.

    Returns:
        Whether they are in use. If not, the ops work all the same, slowly; `cuda_kernel_status` has the reason.
    """
    return _load()[0]


def cuda_kernel_status() -> str:
    """One line: the forms in use, or why the references are used instead."""
    if _load.cache_info().currsize == 0:
        return "reference: load_cuda_kernels() has not been called"
    return _load()[1]


@functools.cache
def _load() -> tuple[bool, str]:
    if os.environ.get("EMSSD_CUDA_KERNELS") == "0":
        return False, "reference: EMSSD_CUDA_KERNELS=0 is set"
    if not torch.cuda.is_available():
        return False, "reference: torch sees no CUDA device"
    reason = _obstacle()
    if reason is not None:
        _logger.warning("emssd CUDA kernels are not available, the slow references are used: %s", reason)
        return False, f"reference: {reason}"
    import triton

    from emssd_compile.ops.triton import forms, varlen

    torch.library.impl("emssd::append_kv", "CUDA", forms.append_kv)
    torch.library.impl("emssd::move_kv", "CUDA", forms.move_kv)
    torch.library.impl("emssd::ragged_attention", "CUDA", forms.ragged_attention)
    choice = ", or varlen_attn where it is faster" if varlen.is_available() else ""
    return True, f"Triton {triton.__version__}{choice}"


def _obstacle() -> str | None:
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < _MIN_CAPABILITY:
            return f"device {index} has compute capability {capability}, the kernels need {_MIN_CAPABILITY}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install triton"
    return None
