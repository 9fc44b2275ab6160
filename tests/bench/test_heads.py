"""`bench.heads`: what it says of a drafter is what decoding with it did."""

import json

import pytest
import torch

from bench import heads, shapes
from emssd_compile.drafters.mlp_speculator import MLPSpeculator, MLPSpeculatorConfig
from tests.export.subjects import VOCABULARY, WIDTH, Small


@pytest.mark.parametrize("how", [(), ("--temperature", "0.5")], ids=["greedy", "drawing"])
def test_the_command_compares_drafters_and_heads_on_the_same_prompts(how, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    MLPSpeculator(MLPSpeculatorConfig(WIDTH, VOCABULARY, num_heads=2)).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(heads, "load", lambda options: Small())
    monkeypatch.setattr(shapes, "demo_prompts", lambda model: [[n % VOCABULARY, 1, 2] for n in range(8)])
    path = tmp_path / "heads.json"
    command = ["--heads", str(tmp_path / "tiny"), "--only", "lookup", "tiny", "--batches", "2", "4", "--tokens", "20"]
    heads.main([*command, "--repeats", "1", "--backend", "eager", "--layout", "packed", "--json", str(path), *how])
    rows = json.loads(path.read_text())["tables"][0]["rows"]
    assert [(row["drafter"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (2, 4) for name in ("none", "lookup", "tiny")
    ]
    none, lookup, tiny = rows[:3]
    assert (none["acceptance_length"], none["num_slots"], none["num_verified"], none["speedup"]) == (1, 0, 0, 1)
    assert 1 < lookup["acceptance_length"] <= 1 + lookup["num_verified"] <= 1 + lookup["num_slots"]
    assert none["num_proposed"] == 0 < lookup["num_proposed"] <= lookup["num_slots"]
    assert (tiny["num_slots"], tiny["acceptance_length"] >= 1) == (2, True)
    assert all(row["tokens_identical"] and row["tokens_per_second"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "tokens a step" in printed
    assert ("temperature 0.5" in printed, "greedy" in printed) == (bool(how), not how)


def test_tokens_that_differ_are_said_to():
    runs = {name: [heads.Run(1.0, 2, 1.0, 0.0, [[1, token]])] * 2 for name, token in (("none", 5), ("other", 6))}

    class Drafts:
        class drafter:
            num_draft_tokens = 3

    rows = heads.summed_up({"none": Drafts, "other": Drafts}, {"none": 0, "other": 2.5}, 1, runs)  # type: ignore[dict-item]
    assert [row.tokens_identical for row in rows] == [True, False]
    assert (rows[1].num_slots, rows[1].num_proposed) == (3, 2.5)


def test_only_what_is_asked_for_is_compiled_beside_plain_decoding():
    options = heads.parse_arguments(["--only", "suffix", "exit 2", "--exit", "2", "--heads"])
    assert list(heads.drafters(options)) == ["none", "suffix", "exit 2"]
    with pytest.raises(SystemExit):
        heads.parse_arguments(["--batches", "0"])
