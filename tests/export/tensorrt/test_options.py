"""`options`: an option is honoured or refused."""

import pytest
import torch

from emssd_compile.errors import OptionError
from emssd_compile.export.tensorrt.options import BuildOptions

UNKNOWN = {"runtime": "trt", "attention": "fast", "weights": "stripped", "hardware_compatibility": "all"}
ONLY_FULL = {"version_compatible": True, "hardware_compatibility": "ampere-plus", "timing_cache": "timings"}
KNOWN = ("8.0", "8.9", "12.0")


@pytest.mark.parametrize(("name", "value"), UNKNOWN.items())
def test_unknown_values_are_refused(name, value):
    with pytest.raises(OptionError, match=f"{name}='{value}' is unknown; choose one of"):
        BuildOptions(**{name: value})


def test_what_would_fail_after_the_build_is_refused_before_it(tmp_path):
    with pytest.raises(OptionError, match=r"must be a list, as in \['8.9'\]"):
        BuildOptions(compute_capabilities="8.9")
    with pytest.raises(OptionError, match="there is no such folder to write it to"):
        BuildOptions(timing_cache=str(tmp_path / "nowhere" / "timings"))


@pytest.mark.parametrize(("name", "value"), ONLY_FULL.items())
def test_what_tensorrt_rtx_lacks_is_refused(name, value):
    options = BuildOptions(**{name: value})
    options.check("tensorrt")
    with pytest.raises(OptionError, match=f"TensorRT-RTX has no {name}: leave it out, or pass runtime='tensorrt'"):
        options.check("tensorrt-rtx")


def _on(monkeypatch, *capability: int) -> None:
    """A GPU of a compute capability, or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capability))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize("wanted", [["8.0", "9.0"], ["80"], []])
def test_unknown_capabilities_are_refused(wanted):
    with pytest.raises(OptionError, match=r"must be of \['12.0', '8.0', '8.9'\] for TensorRT-RTX, and not \["):
        BuildOptions(compute_capabilities=wanted).capabilities(KNOWN)


def test_the_default_capability_is_that_of_the_gpu_here(monkeypatch):
    _on(monkeypatch, 8, 9)
    assert BuildOptions().capabilities(KNOWN) == BuildOptions().capabilities(()) == ("8.9",)
    _on(monkeypatch, 9, 0)
    assert BuildOptions().capabilities(()) == ("9.0",)
    with pytest.raises(OptionError, match=r"for TensorRT-RTX, and not \['9.0'\]"):
        BuildOptions().capabilities(KNOWN)
    _on(monkeypatch)
    with pytest.raises(OptionError, match=r"must be of \['12.0', .* and not \[\]"):
        BuildOptions().capabilities(KNOWN)


def test_tensorrt_builds_for_the_gpu_that_is_here(monkeypatch):
    options = BuildOptions(compute_capabilities=["8.0"])
    for here in ((), (9, 0)):
        _on(monkeypatch, *here)
        with pytest.raises(OptionError, match=r"which is .*, not for \['8.0'\]: export on a machine"):
            options.capabilities(())
    _on(monkeypatch, 8, 0)
    assert options.capabilities(()) == ("8.0",)
