"""Which form of the ops a test calls: the C++ one, or the eager reference."""

from collections.abc import Iterator

import pytest
import torch

from emssd_compile import ops
from emssd_compile.ops import _append_kv, _kept_threshold, _move_kv, _ragged_attention


@pytest.fixture(scope="session")
def cpu_kernels() -> None:
    """The C++ forms are in use, or the test is skipped."""
    if not ops.load_cpu_kernels():
        pytest.skip(f"needs the C++ kernels; {ops.cpu_kernel_status()}")


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """The eager references are in use on CPU, even where the C++ forms have been loaded."""
    with torch.library._scoped_library("emssd", "IMPL") as library:
        library.impl("append_kv", _append_kv.reference, "CPU", allow_override=True)
        library.impl("kept_threshold", _kept_threshold.reference, "CPU", allow_override=True)
        library.impl("move_kv", _move_kv.reference, "CPU", allow_override=True)
        library.impl("ragged_attention", _ragged_attention.reference, "CPU", allow_override=True)
        yield


@pytest.fixture(params=["cpp", "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Runs a test with each form of the ops."""
    request.getfixturevalue("cpu_kernels" if request.param == "cpp" else "reference_kernels")
    return str(request.param)
