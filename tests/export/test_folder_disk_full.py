"""A disk that is full in the middle of an export: the builders of each target run into it, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="files are limited by the operating system")

EXPORT = """
import resource, signal, sys
from pathlib import Path
from emssd_compile.errors import ArtifactError
from tests.export.subjects import optimized
fast = optimized("none")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails instead
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    getattr(fast, f"export_{sys.argv[1]}")(Path(sys.argv[2]))
except ArtifactError as error:
    print(error)
"""


@pytest.mark.parametrize(("target", "library", "limit"), [("onnx", "onnxruntime", 20_000), ("aot", "torch", 60_000)])
def test_a_full_disk_is_named_and_nothing_is_left(target, library, limit, tmp_path):
    pytest.importorskip(library)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", EXPORT, target, str(tmp_path / "artifact"), str(limit)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout or "File size limit" in done.stdout
    assert not list(tmp_path.iterdir())
