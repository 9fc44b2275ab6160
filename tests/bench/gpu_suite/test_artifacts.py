import json

import pytest
import torch

from bench.gpu_suite import artifacts
from emssd_compile.errors import ArtifactError
from emssd_compile.export import TARGETS, find_target

CPU = torch.device("cpu")


def test_every_target_for_gpus_has_cases_that_name_it():
    assert artifacts.CASES.keys() == {name for name in TARGETS if "cuda" in find_target(name).devices}
    assert all(case.backend.split()[0] == target for target, cases in artifacts.CASES.items() for case in cases)


def test_the_smoke_run_exports_and_compares_on_a_cpu(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "onnx.json"
    assert artifacts.main(["--target", "onnx", "--smoke", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["tables"][0]["rows"]
    assert (row["backend"], row["identical"], row["failure"]) == ("onnx", 8, "")


def test_what_does_not_run_here_is_skipped_with_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "tensorrt.json"
    assert artifacts.main(["--target", "tensorrt", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["skipped"] == "tensorrt runs on cuda"
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "no CUDAExecutionProvider" in artifacts.missing("onnx", torch.device("cuda"))


def test_a_case_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    failures = iter([ArtifactError("no"), RuntimeError("boom"), KeyError("gone")])

    def subject(case, device):
        raise next(failures)

    path = tmp_path / "onnx.json"
    monkeypatch.setattr(artifacts, "subject", subject)
    monkeypatch.setattr(artifacts, "missing", lambda target, device: "")
    assert artifacts.main(["--target", "onnx", "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["tables"][0]["rows"]
    assert [row["failure"] for row in rows] == ["ArtifactError: no", "RuntimeError: boom", "KeyError: 'gone'"]
