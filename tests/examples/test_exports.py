"""The examples of exporting run as they are, one a target."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the examples export a Hugging Face model")

from emssd_compile.export.folder import Files, read_manifest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "target", "library"),
    [
        ("02_export_onnx.py", "onnx", "onnxruntime"),
        pytest.param("03_export_aot.py", "aot", "torch", marks=pytest.mark.long),
        pytest.param("04_export_tensorrt.py", "tensorrt", "tensorrt_rtx", marks=pytest.mark.long),
    ],
)
def test_an_example_writes_a_whole_artifact(script, target, library, tmp_path):
    pytest.importorskip(library)
    command = [sys.executable, str(ROOT / "examples" / script), str(tmp_path / "artifact")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "artifact")
    assert manifest.target == target
    with Files(tmp_path / "artifact", manifest.files):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"], "nothing is left elsewhere"
