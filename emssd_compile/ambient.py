"""The state of process and thread that compiling and decoding run in, whatever the caller's is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

compiling = threading.RLock()
"""Held while anything is captured or compiled: both change the state of the process, and torch's tracing is not made
for several threads at once."""

_changing_dtype = threading.RLock()
_is_dtype_changed = False


@contextlib.contextmanager
def neutral(default_dtype: torch.dtype | None) -> Iterator[None]:
    """No gradients, no inference mode, no autocast, the CPU as default device, and a given default dtype, if any.

    Tensors made in inference mode could not be written outside of it, and views made there would turn the user's
    weights into such tensors. Autocast would change the dtypes that a graph was made for.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if default_dtype is not None and (_is_dtype_changed or torch.get_default_dtype() != default_dtype):
            stack.enter_context(_with_default_dtype(default_dtype))
        yield


@contextlib.contextmanager
def _with_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """It belongs to the process, not to a thread: who needs another one waits until nobody else does."""
    global _is_dtype_changed
    with _changing_dtype:
        before, was_changed = torch.get_default_dtype(), _is_dtype_changed
        _is_dtype_changed = True
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
            _is_dtype_changed = was_changed
