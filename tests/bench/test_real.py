"""`bench.real`: starts and speeds of a model in each precision, or the reason why there are none."""

import json

import pytest

from bench import real

QUICK = ["--models", "tiny-llama", "--batches", "1", "2", "--tokens", "4", "--repeats", "1", "--backend", "eager"]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """In this process: what is measured is not what is tested."""
    monkeypatch.setattr(real, "apart", lambda work, *arguments: work(*arguments))


def test_a_precision_has_starts_and_all_ways(tmp_path, capsys):
    path = tmp_path / "real.json"
    real.main([*QUICK, "--precisions", "float32", "--ways", "hf_generate", "ours_none", "--json", str(path)])
    (table,) = json.loads(path.read_text())["tables"]
    assert table["title"] == "tiny-llama, float32"
    assert [(row["batch"], row["way"]) for row in table["rows"]] == [
        (batch, way) for batch in (1, 2) for way in ("hf_generate", "ours_none")
    ]
    assert all(row["tokens_identical"] and row["tokens_per_second"] > 0 for row in table["rows"])
    assert len(table["starts"]) == 2
    for start in table["starts"]:
        assert min(start["load"], start["optimize"], start["warmup"], start["first_token"], start["needed"]) > 0
    assert "x hf_generate" in capsys.readouterr().out


def test_what_is_not_installed_is_said_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    real.main([*QUICK, "--precisions", "int8", "float32", "--ways", "ours_none"])
    out = capsys.readouterr().out
    assert "tiny-llama, int8: int8 needs torchao: pip install torchao" in out
    assert "tiny-llama, float32" in out
