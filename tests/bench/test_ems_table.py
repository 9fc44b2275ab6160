import json
from types import SimpleNamespace
from typing import Any

import pytest

from bench import ems_subjects, ems_table, profiles, shapes
from bench.command import make_console
from bench.replay import draw, foretell, gap_lengths

PROFILE = [0.9, 0.8, 0.5]
NEW = 20
SMALL = ["--shape", "tiny-opt", "--backend", "eager", "--prompt-tokens", "30", "--new-tokens", str(NEW)]


def run(path, *arguments):
    ems_table.main([*SMALL, "--profile", *map(str, PROFILE), "--repeats", "1", "--json", str(path), *arguments])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ems") / "table.json", "--batches", "1", "4")


@pytest.fixture(scope="module")
def rows(saved):
    return {(row["batch"], row["candidate"]): row for row in saved["tables"][0]["rows"]}


def test_every_way_is_there_at_every_batch_and_has_the_models_own_tokens(rows):
    names = [
        *("hf_generate", "ours, none", "packed inputs, unpadded KV", "padded inputs, unpadded KV"),
        *("packed inputs, gaps in KV", "padded inputs, gaps in KV"),
    ]
    assert list(rows) == [(batch, name) for batch in (1, 4) for name in names]
    assert all(row["identical_rows"] == row["batch"] for row in rows.values())


def test_the_drafts_are_accepted_as_replayed(rows):
    profile = profiles.Profile(tuple(PROFILE), (1.0,) * 3)
    steps = [foretell(draws, profile, NEW) for draws in draw(4, NEW)]
    for batch in (1, 4):
        emitted = batch * (NEW - 1) / sum(map(len, steps[:batch]))
        for name in ("packed inputs, unpadded KV", "padded inputs, gaps in KV"):
            assert rows[batch, name]["emitted"] == pytest.approx(emitted)
        assert rows[batch, "ours, none"]["emitted"] == rows[batch, "hf_generate"]["emitted"] == 1


def test_speedups_are_ratios_of_the_times_shown(rows):
    for (batch, _), row in rows.items():
        assert row["tokens_per_second"] == pytest.approx(batch * (NEW - 1) / row["seconds"][0])
        for base, speedup in (("hf_generate", "over_hugging_face"), ("ours, none", "over_plain")):
            assert row[speedup] == pytest.approx(rows[batch, base]["seconds"][0] / row["seconds"][0])


def test_the_papers_figures_stand_beside_the_ways_they_belong_to(saved, rows):
    assert saved["paper_tokens_per_second"]["unpadded"]["24"] == 1321
    for batch in (1, 4):
        paper = {name: row["paper_over_greedy"] for (b, name), row in rows.items() if b == batch}
        assert {name for name, value in paper.items() if value} == {
            "packed inputs, unpadded KV",
            "padded inputs, gaps in KV",
        }
        assert paper["packed inputs, unpadded KV"] == profiles.paper_speedup("unpadded", batch)
        assert paper["padded inputs, gaps in KV"] == profiles.paper_speedup("padded", batch)


def test_padded_inputs_are_those_that_feed_most(rows):
    for batch in (1, 4):
        for gaps in ("unpadded KV", "gaps in KV"):
            packed, padded = (rows[batch, f"{layout} inputs, {gaps}"]["fed"] for layout in ("packed", "padded"))
            assert packed < padded == len(PROFILE) + 1  # a row's last steps verify fewer drafts
        assert rows[batch, "ours, none"]["fed"] == 1


def test_prompts_are_read_once_and_again_after_others(monkeypatch):
    read = []
    fast: Any = SimpleNamespace(generate=lambda prompts, **_: read.append(prompts))
    compiled = ems_subjects.Compiled(fast)
    for prompts in ([[1]], [[1]], [[2]], [[1]]):
        compiled.read(prompts)
    assert read == [[[1]], [[2]], [[1]]]


def test_gaps_by_hand():
    # Row 0 emits 4, 2, 3 and ends; row 1 emits 1, 6, 1, 1. The shared index advances by 4, 6, 3, 1.
    # Before its steps row 0 has gaps of 0, 0, 4 and row 1 of 0, 3, 3, 5.
    assert gap_lengths([[4, 2, 3], [1, 6, 1, 1]]) == [round(4 / 3), round(11 / 4)]
    assert gap_lengths([[4, 2, 3]]) == [0]
    assert gap_lengths([[]]) == [0]


def test_the_default_profiles_are_the_measured_one_and_the_papers(monkeypatch):
    prompts = shapes.demo_prompts()[::8]
    monkeypatch.setattr(ems_table, "LOOKUP_NEW_TOKENS", 32)
    monkeypatch.setattr(shapes, "demo_prompts", lambda: prompts)
    options = ems_table.parse_arguments([])
    found = ems_table.default_profiles(make_console(), options)
    measured, paper = found.values()
    assert len(measured.right) == len(paper.right) == 7
    assert 1.5 < measured.expected_emitted < 4
    assert measured.expected_emitted - 1 < measured.expected_drafts < 7  # lookup does not always find something
    assert paper.expected_emitted == pytest.approx(313 / 79)
    assert paper.drafted == measured.drafted
