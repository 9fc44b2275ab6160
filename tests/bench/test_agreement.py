"""`bench.agreement`: how often a precision says what float32 says, along the same text."""

import json
from typing import Any

import torch

from bench import agreement, precisions
from bench.agreement import Teacher

QUICK = ["--models", "tiny-llama", "--prompts", "2", "--tokens", "6"]


def test_a_teacher_leads_along_its_text_and_notes_what_would_have_been_said():
    teacher = Teacher([1, 2, 3])
    for length, said in ((1, 2), (2, 0), (2, 0)):  # a place may be asked for twice
        led = teacher(torch.zeros(1, length, dtype=torch.long), torch.eye(4)[said].expand(1, 4))
        assert int(led.argmax()) == [1, 2, 3][length]
        assert led.isinf().sum() == 3
    assert teacher.choices == {1: 2, 2: 0}
    assert teacher.agreed == 1


def test_float32_agrees_with_itself_and_packed_keys_less(tmp_path, capsys):
    path = tmp_path / "agreement.json"
    agreement.main([*QUICK, "--precisions", "float32", "--json", str(path)])
    own, packed = json.loads(path.read_text())["tables"][0]["rows"]
    assert own == {"precision": "float32", "kv_dtype": None, "tokens": 12, "top1": 1.0}
    assert (packed["kv_dtype"], packed["tokens"]) == ("int8", 12)
    assert "top-1 agreement" in capsys.readouterr().out


def test_places_that_differ_are_counted(monkeypatch, tmp_path):
    """The compiled model has another LM head than the one that made the texts."""
    build, path = precisions.build, tmp_path / "agreement.json"

    def other(*given: Any) -> torch.nn.Module:
        model = build(*given)
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
        return model

    monkeypatch.setattr(precisions, "build", other)
    agreement.main([*QUICK, "--precisions", "float32", "--json", str(path)])
    assert json.loads(path.read_text())["tables"][0]["rows"][0]["top1"] < 0.5


def test_what_is_not_installed_is_said_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    agreement.main([*QUICK, "--precisions", "int8", "float32"])
    out = capsys.readouterr().out
    assert "tiny-llama, int8: int8 needs torchao: pip install torchao" in out
    assert "float32" in out
