"""`toolchain`: what is missing to compile is named before any work, with what to do."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError

from emssd_compile import optimize
from emssd_compile.errors import BackendError
from emssd_compile.lowering import BACKENDS
from emssd_compile.lowering.toolchain import reason
from tests.passes.graphs import model_with_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("wanted", ["/nowhere/g++", "false", ""])
def test_a_machine_without_a_compiler_is_told_by_optimize(wanted, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", wanted)
    if not wanted:
        monkeypatch.setenv("PATH", str(tmp_path))
    found = rf"CXX='{re.escape(wanted)}' is none that runs" if wanted else r"there is no g\+\+"
    compiler = torch._inductor.config.patch({"cpp.cxx": (None, wanted or "no-g++")})  # g++ may have been found before
    with compiler, pytest.raises(BackendError, match=rf"has no compiler: {found}; install g\+\+ .* backend=\"eager\""):
        optimize(model_with_attention(), "none", max_batch=2, max_length=8)


def test_a_machine_without_a_compiler_decodes_with_eager_and_says_how(monkeypatch):
    monkeypatch.setattr("emssd_compile.compiler.load_kernels", lambda device_type: False)
    monkeypatch.setattr("emssd_compile.compiler.kernel_status", lambda device_type: "reference: no C++ compiler found")
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        fast = optimize(model_with_attention(), "none", max_batch=2, max_length=8, backend="eager")
        assert fast.generate([[1, 2]], max_new_tokens=3)
    assert "ops on cpu: reference: no C++ compiler found" in str(fast.explain())


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_cache_that_cannot_be_written_is_named(backend, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", "/proc/nowhere"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        with pytest.raises(BackendError, match=rf"{folder}, where .* cannot be written: .* TORCHINDUCTOR_CACHE_DIR"):
            optimize(model_with_attention(), "none", max_batch=2, max_length=8, backend=backend)


def test_what_inductor_cannot_compile_is_an_error_of_ours(monkeypatch):
    """A compiler that is there and fails: its own words, not its command line."""

    def fails(*command: object, **options: object) -> None:
        inner = CppCompileError(["g++", "-O3"], "x.cpp:3:10: fatal error: omp.h: No such file or directory")
        raise InductorError(inner, None)

    fast = optimize(model_with_attention(), "none", max_batch=2, max_length=8)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    with pytest.raises(BackendError, match=r"fatal error: omp.h: No such file .*backend=\"eager\""):
        fast.warmup()


def test_the_reason_is_what_the_compiler_says():
    error = CppCompileError(["g++"], "In file included\nx.cpp:3: error: expected ;\nmore")
    assert reason(error) == "x.cpp:3: error: expected ;"
    assert reason(subprocess.SubprocessError()) == "SubprocessError"
