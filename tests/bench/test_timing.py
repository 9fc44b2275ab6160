import json
from dataclasses import dataclass

import pytest
import torch

from bench import timing


@dataclass
class Run:
    tokens: list[list[int]]
    seconds: float


def test_compare_alternates_and_takes_ratios_within_a_repeat():
    order = []

    def candidate(name, seconds, tokens):
        remaining = iter(seconds)

        def run():
            order.append(name)
            return Run(tokens, next(remaining))

        return run

    # The first run of each is the warm-up. The machine halves its speed in the last repeat; the ratio does not notice.
    comparison = timing.compare(
        {
            "plain": candidate("plain", [99, 2, 2, 4], [[1, 2], [3]]),
            "fast": candidate("fast", [99, 1, 1, 2], [[1, 2], [3]]),
            "wrong": candidate("wrong", [99, 4, 1, 1], [[1, 2], [4]]),
        },
        repeats=3,
    )
    assert order == ["plain", "fast", "wrong"] * 2 + ["wrong", "fast", "plain"] + ["plain", "fast", "wrong"]
    plain, fast, wrong = comparison.timings
    assert (plain.speedup, fast.speedup, wrong.speedup) == (1, 2, 2)
    assert (plain.seconds, plain.median_seconds, plain.num_tokens) == ([2, 2, 4], 2, 3)
    assert [t.tokens_identical for t in comparison.timings] == [True, True, False]


def test_a_comparison_is_saved_and_shown_with_its_hardware(tmp_path):
    comparison = timing.compare({"plain": lambda: Run([[1, 2, 3]], 0.5)}, repeats=2)
    comparison.save(tmp_path / "result.json", batch_size=1)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["batch_size"] == 1
    assert saved["timings"][0]["seconds"] == [0.5, 0.5]
    assert saved["hardware"]["torch"] == torch.__version__
    assert saved["hardware"]["threads"] == torch.get_num_threads()
    table = comparison.table("title")
    assert [list(column.cells) for column in table.columns] == [
        ["plain"], ["0.500"], ["0.500–0.500"], ["6.0"], ["1.00"], ["yes"]
    ]  # fmt: skip
    assert f"torch {torch.__version__}" in str(table.caption)


@pytest.mark.parametrize(("least_seconds", "repeats"), [(0.0, 2), (5.0, 3)], ids=["enough", "too short"])
def test_short_runs_are_repeated_until_they_took_long_enough(monkeypatch, least_seconds, repeats):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def run():
        clock[0] += 1.0  # the warm-up, which counts for nothing, takes as long
        return clock[0]

    runs = timing.alternate({"one": run, "other": run}, 2, least_seconds)
    assert [len(outcomes) for outcomes in runs.values()] == [1 + repeats] * 2


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="nothing to time"):
        timing.compare({})
    with pytest.raises(ValueError, match="nothing to time"):
        timing.compare({"plain": lambda: Run([[1]], 1.0)}, repeats=0)
