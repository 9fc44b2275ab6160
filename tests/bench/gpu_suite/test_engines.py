import json

import pytest
import torch

from bench.gpu_suite import engines


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_targets_are_imported_and_no_engine_is_run(tmp_path):
    path = tmp_path / "engines.json"
    assert engines.main(["--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["skipped_engines"] == "needs a CUDA GPU"
    imports, ran = record["tables"]
    assert {row["target"]: row["import"] for row in imports["rows"]} == dict.fromkeys(("aot", "onnx", "tensorrt"), "ok")
    assert ran["rows"] == []


def test_a_case_that_cannot_be_run_says_why(monkeypatch):
    """There is no GPU to build for, so the export is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    verdict = engines.run(engines.CASES[0], torch.device("cpu"))
    assert not verdict.good
    assert verdict.failure.startswith("OptionError: compute_capabilities must be of")
