import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emssd_compile import ops
from emssd_compile.ops import cuda_library
from tests.ops.triton_process import needs_triton

PROGRAM = """
import sys
from emssd_compile import ops
print(ops.kernel_status("cuda"))
print(ops.load_kernels("cuda"))
print(ops.kernel_status("cuda"))
print("triton" in sys.modules)
"""


def test_references_serve_where_the_kernels_are_switched_off() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "EMSSD_CUDA_KERNELS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "reference: load_cuda_kernels() has not been called",
        "False",
        "reference: EMSSD_CUDA_KERNELS=0 is set",
        "False",
    ]


REGISTER_PROGRAM = """
from tests.ops.triton_process import interpret
interpret()
import torch
from emssd_compile import ops
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 0
print(ops.load_kernels("cuda"))
print(ops.kernel_status("cuda"))
for name in ("append_kv", "move_kv", "ragged_attention"):
    print(torch._C._dispatch_has_kernel_for_dispatch_key(f"emssd::{name}", "CUDA"))
from emssd_compile.ops.triton import forms
q, cache, zeros = torch.randn(1, 2, 4).double(), torch.randn(1, 1, 1, 4).double(), torch.zeros(1, dtype=torch.int64)
arguments = (q, cache, cache, torch.tensor([0, 1]), zeros, zeros)
for dtype in (torch.float64, torch.float32):
    call = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in arguments]
    print(torch.allclose(forms.ragged_attention(*call, scale=1.0).double(), cache.flatten(0, 1).expand(1, 2, 4)))
"""


@needs_triton
def test_the_kernels_are_registered() -> None:
    """With no device, they run on the CPU, interpreted; float64 is served by the reference."""
    done = subprocess.run(
        [sys.executable, "-c", REGISTER_PROGRAM],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded, status, *others = done.stdout.splitlines()
    assert loaded == "True"
    assert status.startswith("Triton ")
    assert others == ["True"] * 5


def status(monkeypatch: pytest.MonkeyPatch, *, available: bool = True, capability: tuple[int, int] = (9, 0)) -> str:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    loaded, reason = cuda_library._load.__wrapped__()  # not through the cache, which holds this process's answer
    assert not loaded
    return str(reason)


def test_status_says_that_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(monkeypatch, available=False) == "reference: torch sees no CUDA device"


def test_status_says_that_the_device_is_too_old(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert "device 0 has compute capability (7, 5)" in status(monkeypatch, capability=(7, 5))
    assert "the slow references are used" in caplog.text


def test_status_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in status(monkeypatch)
    assert "the slow references are used" in caplog.text


def test_other_devices_have_no_kernels() -> None:
    assert not ops.load_kernels("mps")
    assert ops.kernel_status("mps") == "reference: there are no kernels for mps"
