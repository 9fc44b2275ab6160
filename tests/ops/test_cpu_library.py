import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
    ],
    ids=["no compiler", "compiler fails"],
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
schemas = [str(getattr(torch.ops.emssd, name).default._schema) for name in ("append_kv", "move_kv", "ragged_attention")]
print(schemas, torch.ops.emssd.grouped_linear(torch.ones(2, 3), [torch.ones(4, 3)], 1).sum().item())
"""

PREBUILT_PROGRAM = """
import sys, torch
from pathlib import Path
from emssd_compile import ops
library = Path(sys.argv[1])
print(ops.load_cpu_kernels(), ops.load_cpu_kernels(library.read_bytes, library), ops.load_cpu_kernels())
print(ops.cpu_kernel_status(), ops.grouped_linear(torch.ones(2, 3), [torch.ones(4, 3)], 1).sum().item())
"""


def _standalone_library(folder: Path) -> Path:
    library = folder / "library.so"
    library.write_bytes(cpu_library.standalone_library())
    return library


def test_the_standalone_library_defines_the_ops_where_python_does_not(cpu_kernels: None, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STANDALONE_PROGRAM, str(_standalone_library(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    schemas = [str(op._schema) for op in (ops.append_kv, ops.move_kv, ops.ragged_attention)]
    assert done.stdout == f"{schemas} 24.0\n"


def test_the_standalone_library_serves_where_none_can_be_built(cpu_kernels: None, tmp_path: Path) -> None:
    library = str(_standalone_library(tmp_path))
    environment = {**os.environ, "PATH": "", "CXX": "", "EMSSD_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PREBUILT_PROGRAM, library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "False True True"
    assert second.endswith(f"{library} 24.0")


def test_source_hash_is_stable() -> None:
    assert ops.source_hash() == ops.source_hash()
    assert len(bytes.fromhex(ops.source_hash())) == 32


@pytest.fixture
def quick_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own, and a compiler that takes no time; returns the only file in the cache, once it is built."""

    def compiled(compiler: list[str], flags: list[str], definitions: str, folder: Path) -> Path:
        (folder / "library.so").write_bytes(CONTENT)
        return folder / "library.so"

    monkeypatch.setattr(cpu_library, "_compile", compiled)
    monkeypatch.setenv("EMSSD_CACHE_DIR", str(tmp_path / "cache"))
    library, content = cpu_library._build()
    assert library is not None
    assert content == CONTENT
    assert [*library.parent.iterdir()] == [library]
    return library


CONTENT = bytes(range(256)) * 8


def _make_folder(library: Path) -> None:
    library.unlink()
    (library / "inside").mkdir(parents=True)


def _make_link(library: Path) -> None:
    library.unlink()
    library.symlink_to("nowhere")


def _make_fifo(library: Path) -> None:
    library.unlink()
    os.mkfifo(library)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda library: os.truncate(library, len(CONTENT) // 2),
    "empty": lambda library: os.truncate(library, 0),
    "zeroed": lambda library: library.write_bytes(bytes(len(CONTENT) + 32)),
    "a byte changed": lambda library: library.write_bytes(b"\xff" + library.read_bytes()[1:]),
    "of an older form": lambda library: library.write_bytes(CONTENT),
    "a folder": _make_folder,
    "a broken link": _make_link,
    "not readable": lambda library: library.chmod(0),
    "a fifo": _make_fifo,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_library_is_built_anew(damage: Callable[[Path], object], quick_build: Path) -> None:
    whole = quick_build.read_bytes()
    damage(quick_build)
    assert cpu_library._build() == (quick_build, CONTENT)
    assert quick_build.read_bytes() == whole
    assert [*quick_build.parent.iterdir()] == [quick_build]


def test_a_library_is_flushed_before_it_is_renamed(quick_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            done.append(name)
            return function(*given)

        return run

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", noted("rename", Path.replace))
    quick_build.unlink()
    cpu_library._build()
    assert done == ["fsync", "rename"]


def test_where_nothing_can_be_kept_the_library_serves_this_process(
    quick_build: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EMSSD_CACHE_DIR", "/dev/null/nowhere")
    assert cpu_library._build() == (None, CONTENT)
    assert "cannot be kept in /dev/null/nowhere (Not a directory)" in caplog.text
    assert "set EMSSD_CACHE_DIR to a folder" in caplog.text
    monkeypatch.delenv("EMSSD_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home
    assert cpu_library._build() == (None, CONTENT)


@pytest.fixture
def first_load(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """As in a process that has loaded nothing; the libraries that are loaded, which do nothing."""
    loaded: list[Path] = []
    monkeypatch.setattr(cpu_library, "_load", functools.cache(cpu_library._load.__wrapped__))
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    return loaded


def test_what_was_begun_is_built_once_and_waited_for(
    quick_build: Path, first_load: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    slow, build = threading.Event(), cpu_library._build

    def built_slowly() -> tuple[Path | None, bytes]:
        built.append(threading.current_thread().name)
        slow.wait(60)
        return build()

    monkeypatch.setattr(cpu_library, "_build", built_slowly)
    for _ in range(2):
        cpu_library.begin_cpu_kernels()  # returns at once
    assert not first_load
    slow.set()
    assert ops.load_cpu_kernels()
    cpu_library.begin_cpu_kernels()
    assert ops.load_cpu_kernels()
    assert first_load == [quick_build]
    assert len(built) == 1
    assert built != [threading.current_thread().name]


def test_what_was_begun_and_failed_is_told_when_it_is_asked_for(
    first_load: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"EMSSD_CACHE_DIR": str(tmp_path), "CXX": "false"}.items():
        monkeypatch.setenv(name, value)
    cpu_library.begin_cpu_kernels()
    assert cpu_library._load() == (False, "reference: false failed: exit status 1")


UNWRITABLE_PROGRAM = """
import logging, os
logging.basicConfig()
from emssd_compile import ops
from emssd_compile.ops import cpu_library

_, content = cpu_library._build()  # so that it need not be compiled again

def compiled(compiler, flags, definitions, folder):
    (folder / "library.so").write_bytes(content)
    return folder / "library.so"

cpu_library._compile = compiled
os.environ["EMSSD_CACHE_DIR"] = "/dev/null/nowhere"
print(ops.load_cpu_kernels(), ops.cpu_kernel_status())
"""


def test_kernels_work_without_a_cache(cpu_kernels: None) -> None:
    command = [sys.executable, "-c", UNWRITABLE_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True C++ (")
    assert done.stdout.endswith("built for this process\n")
    assert "EMSSD_CACHE_DIR" in done.stderr
