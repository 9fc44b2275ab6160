"""Decoding with an artifact takes no more memory the longer it goes on."""

import os
import sys
from pathlib import Path

import pytest

import emssd_compile
from tests.export.subjects import artifact, prompt


def _resident() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("target", "library"), [("onnx", "onnxruntime"), ("aot", "torch")])
def test_memory_stays_flat_over_many_steps(target, library):
    pytest.importorskip(library)
    loaded = emssd_compile.load(artifact(target, "none"))
    loaded.generate([prompt(3)], max_new_tokens=20)
    before = _resident()
    loaded.generate([prompt(3)], max_new_tokens=200)
    assert loaded.stats.num_steps >= 200
    assert _resident() - before < 2 << 20
