"""`bench.heads`: what it says of a drafter is what decoding with it did."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import emssd_compile
from bench import head_subjects, heads, shapes
from emssd_compile.drafters import HEADS
from emssd_compile.drafters.mlp_speculator import MLPSpeculator, MLPSpeculatorConfig
from tests.export.subjects import VOCABULARY, WIDTH, Small
from tests.training.toys import TEXT, Characters
from tests.zoo import toy_model


@pytest.mark.parametrize(
    "how", [(), pytest.param(("--temperature", "0.5"), marks=pytest.mark.long)], ids=["greedy", "drawing"]
)
def test_the_command_compares_drafters_and_heads_on_the_same_prompts(how, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    MLPSpeculator(MLPSpeculatorConfig(WIDTH, VOCABULARY, num_heads=2)).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(heads, "load", lambda options: Small())
    monkeypatch.setattr(shapes, "demo_prompts", lambda model: [[n % VOCABULARY, 1, 2] for n in range(8)])
    path = tmp_path / "heads.json"
    command = ["--heads", str(tmp_path / "tiny"), "--only", "lookup", "tiny", "--batches", "2", "4", "--tokens", "20"]
    command += ["--exit", "1"]
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

    compiled: Any = {"none": Drafts, "other": Drafts}
    rows = heads.summed_up(compiled, {"none": "-", "other": "given"}, {"none": 0, "other": 2.5}, 1, runs)
    assert [row.tokens_identical for row in rows] == [True, False]
    assert (rows[1].num_slots, rows[1].num_proposed, rows[1].weights) == (3, 2.5, "given")


def test_every_drafter_is_compared_and_said_to_be_untrained_where_it_is(tmp_path, monkeypatch):
    options = heads.parse_arguments([])
    model = cast(Any, SimpleNamespace(config=SimpleNamespace(num_hidden_layers=4)))
    compared = head_subjects.subjects(model, options)
    kinds = {kind.kind for kind in HEADS}
    assert kinds < {*compared}
    assert {"none", "lookup", "suffix", "suffix or mlp", "exit 2", "draft model", "parallel model"} < {*compared}
    shipped = {path.name for path in heads.shipped_heads("demo")}
    assert {name for name in kinds if compared[name].weights == "untrained"} == kinds - shipped
    assert compared["parallel model"].weights == "given, untrained for it"
    assert {compared[name].weights for name in shipped} == {"given"}
    options.model = tmp_path
    assert head_subjects.subjects(model, options)["draft model"].weights == "the target's first 2 layers"


def test_only_what_is_asked_for_is_compiled_beside_plain_decoding():
    options = heads.parse_arguments(["--only", "suffix", "exit 2", "--exit", "2", "--heads"])
    assert list(head_subjects.subjects(cast(Any, None), options)) == ["none", "suffix", "exit 2"]
    with pytest.raises(SystemExit):
        heads.parse_arguments(["--batches", "0"])
    with pytest.raises(SystemExit, match="'sufix': there is no such drafter here; there are none, lookup, suffix, "):
        head_subjects.subjects(cast(Any, None), heads.parse_arguments(["--only", "sufix", "--exit", "2", "--heads"]))


def test_a_head_with_chains_is_compared_at_other_lengths():
    options = heads.parse_arguments(["--draft-tokens", "1", "2", "--exit", "2"])
    compared = head_subjects.subjects(cast(Any, None), options)
    assert {name for name in compared if "K=" in name} == {f"{kind} K={k}" for kind in ("mlp", "mtp") for k in (1, 2)}
    made = cast(Any, compared["mlp K=2"].make())
    assert (made.num_draft_tokens, compared["mlp K=2"].weights) == (2, "given")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=kind.kind, marks=() if kind.kind == "medusa" else pytest.mark.long) for kind in HEADS],
)
def test_a_head_of_each_kind_is_made_for_the_model(kind):
    options = heads.parse_arguments(["--only", kind.kind, "--heads"])
    model = toy_model("llama")
    subject = head_subjects.subjects(model, options)[kind.kind]
    fast = emssd_compile.optimize(model, subject.make(), max_batch=2, max_length=48, backend="eager")
    prompt = [[5, 3, 9], [4]]
    plain = emssd_compile.optimize(model, "none", max_batch=2, max_length=48, backend="eager")
    assert fast.generate(prompt, max_new_tokens=8) == plain.generate(prompt, max_new_tokens=8)


def test_what_is_trained_for_the_bench_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("EMSSD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(head_subjects, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda folder: Characters()))
    (tmp_path / "text.txt").write_text(TEXT * 4)
    given = ["--only", "medusa", "--heads", "--train-on", str(tmp_path / "text.txt"), "--train-tokens", "1024"]
    options = heads.parse_arguments([*given, "--backend", "eager"])
    subject = head_subjects.subjects(toy_model("llama"), options)["medusa"]
    assert subject.weights == "1024 tokens"
    make = cast(Callable[[], nn.Module], subject.make)
    first = make().state_dict()
    monkeypatch.setattr("emssd_compile.training.loop.Trainer._step", None)  # nothing is left to train
    assert all(torch.equal(value, first[name]) for name, value in make().state_dict().items())
