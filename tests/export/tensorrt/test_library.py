"""`library`: a runtime that is missing is named, and what TensorRT says is kept."""

import sys
from types import SimpleNamespace

import pytest

from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.export.tensorrt.library import find_runtime, load_runtime, make_log


def test_a_missing_runtime_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ArtifactError, match=r'pip install "emssd_compile\[tensorrt-rtx\]"$'):
        find_runtime("tensorrt-rtx")
    with pytest.raises(ArtifactError, match=r"emssd_compile\[tensorrt\].*; or .*emssd_compile\[tensorrt-rtx\]"):
        find_runtime("auto")


def test_auto_takes_what_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    rtx = SimpleNamespace(IKVCacheUpdateLayer=SimpleNamespace(update_lengths=None))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    assert find_runtime("auto") == "tensorrt-rtx"
    assert load_runtime("tensorrt-rtx") is rtx
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    assert find_runtime("auto") == "tensorrt"


def test_a_runtime_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9"))
    with pytest.raises(ArtifactError, match=r"tensorrt 10.9 is too old: 11 of TensorRT"):
        load_runtime("tensorrt")


def test_an_unknown_runtime_is_refused():
    with pytest.raises(OptionError, match=r"runtime='trt' is unknown; choose 'auto' or one of \['tensorrt', "):
        find_runtime("trt")


def test_the_log_keeps_errors_and_nothing_else():
    trt = load_runtime("tensorrt-rtx")
    log = make_log(trt)
    assert log.explain() == "it gave no reason"
    for severity, message in (
        (trt.ILogger.WARNING, "slow"),
        (trt.ILogger.ERROR, "node_3:\n no kernel"),
        (trt.ILogger.ERROR, "[checkMacros.cpp::catchCudaError::250] no driver"),
    ):
        log.log(severity, message)
    assert log.explain() == "node_3: no kernel"
