import os
import subprocess
import sys
from pathlib import Path

import pytest

from emssd_compile import ops
from emssd_compile.ops import cpu_library

FALLBACK_PROGRAM = """
import torch
from emssd_compile import ops
print(ops.cpu_kernel_status())
print(ops.load_cpu_kernels())
print(ops.cpu_kernel_status())
zeros = torch.zeros(1, dtype=torch.int64)
cache = torch.zeros(1, 1, 1, 4)
ops.append_kv(cache, cache.clone(), torch.ones(1, 1, 4), torch.ones(1, 1, 4), zeros, zeros)
print(cache.sum().item())
"""


def test_references_serve_where_the_library_is_switched_off() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK_PROGRAM],
        env={**os.environ, "EMSSD_CPU_KERNELS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "reference: load_cpu_kernels() has not been called",
        "False",
        "reference: EMSSD_CPU_KERNELS=0 is set",
        "4.0",
    ]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "", "CXX": ""}, "reference: no C++ compiler found"),
        ({"CXX": "false"}, "reference: false failed: exit status 1"),
        ({"EMSSD_CACHE_DIR": "/dev/null/nowhere"}, "reference: [Errno 20] Not a directory"),
    ],
    ids=["no compiler", "compiler fails", "no cache folder"],
)
def test_status_says_why_no_library_can_be_built(
    environment: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"EMSSD_CACHE_DIR": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    loaded, status = cpu_library._load.__wrapped__()  # not through the cache, which holds this process's answer
    assert not loaded
    assert status.startswith(reason)
    assert not list(tmp_path.iterdir())


def test_status_names_the_library(cpu_kernels: None) -> None:
    assert ops.cpu_kernel_status().startswith("C++ (")
    assert ops.cpu_kernel_status().endswith(".so")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_one_openmp_runtime(cpu_kernels: None) -> None:
    """A second one would fight the first for the cores."""
    program = (
        "from emssd_compile import ops; assert ops.load_cpu_kernels();"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1].rsplit('/')[-1]})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(eval(done.stdout)) == 1, done.stdout


STANDALONE_PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
schemas = [str(getattr(torch.ops.emssd, name).default._schema) for name in ("append_kv", "ragged_attention")]
print(schemas, torch.ops.emssd.packed_linear(torch.ones(2, 3), torch.ones(4, 3)).sum().item())
"""

PREBUILT_PROGRAM = """
import sys, torch
from pathlib import Path
from emssd_compile import ops
print(ops.load_cpu_kernels(), ops.load_cpu_kernels(Path(sys.argv[1])), ops.load_cpu_kernels())
print(ops.cpu_kernel_status(), ops.packed_linear(torch.ones(2, 3), torch.ones(4, 3)).sum().item())
"""


def test_the_standalone_library_defines_the_ops_where_python_does_not(cpu_kernels: None) -> None:
    command = [sys.executable, "-c", STANDALONE_PROGRAM, str(cpu_library.standalone_library())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    schemas = [str(op._schema) for op in (ops.append_kv, ops.ragged_attention)]
    assert done.stdout == f"{schemas} 24.0\n"


def test_the_standalone_library_serves_where_none_can_be_built(cpu_kernels: None, tmp_path: Path) -> None:
    library = str(cpu_library.standalone_library())
    environment = {**os.environ, "PATH": "", "CXX": "", "EMSSD_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PREBUILT_PROGRAM, library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "False True True"
    assert second.endswith(f"{library} 24.0")


def test_source_hash_is_stable() -> None:
    assert ops.source_hash() == ops.source_hash()
    assert len(bytes.fromhex(ops.source_hash())) == 32
