import json
import statistics

import pytest
import torch

from bench import shapes, speedup
from bench.baselines import hf_generate
from bench.baselines.common import BaselineResult
from bench.candidates import CANDIDATES, Run, Task

SHORT = ["--tokens", "4", "--repeats", "2", "--least-seconds", "0", "--backend", "eager"]
QUICK = ["--shape", "tiny-llama", "--batches", "2", "1", *SHORT]


def off_by_one(task: Task) -> Run:
    """A candidate that gets the last row's last token wrong, and only when asked for more than one."""

    def run(prompts: list[list[int]], *, max_new_tokens: int) -> BaselineResult:
        tokens = hf_generate.run(task.model, prompts, max_new_tokens=max_new_tokens).tokens
        if max_new_tokens > 1:
            tokens[-1][-1] ^= 1
        return BaselineResult(tokens, seconds=0.5)

    return run


def out_of_memory(task: Task) -> Run:
    def run(prompts: list[list[int]], *, max_new_tokens: int) -> BaselineResult:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("no room for [2 rows]")
        return hf_generate.run(task.model, prompts, max_new_tokens=max_new_tokens)

    return run


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CANDIDATES, "vanilla_padded", off_by_one)
    monkeypatch.setitem(CANDIDATES, "realign", out_of_memory)


def test_every_candidate_has_its_row_whatever_the_others_do(candidates, tmp_path, capsys):
    record_path, plot_path = tmp_path / "speedup.json", tmp_path / "speedup.png"
    names = ["hf_generate", "vanilla_padded", "realign", "ours_none"]
    status = speedup.main([*QUICK, "--candidates", *names, "--json", str(record_path), "--plot", str(plot_path)])
    assert status == 1  # a wrong token in float32
    record = json.loads(record_path.read_text())
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    assert (record["shape"], record["dtype"], record["tokens"]) == ("tiny-llama", "float32", 4)
    assert [table["batch"] for table in record["tables"]] == [1, 2]
    for table in record["tables"]:
        rows = {row["candidate"]: row for row in table["candidates"]}
        assert list(rows) == names
        assert rows["hf_generate"]["tokens_identical"]
        assert rows["hf_generate"]["total_speedup"] == 1
        assert len(rows["hf_generate"]["total_seconds"]) == len(rows["hf_generate"]["prefill_seconds"]) == 2
        assert rows["ours_none"]["tokens_identical"]
        assert rows["ours_none"]["num_padding_tokens"] == 0
        assert not rows["vanilla_padded"]["tokens_identical"]
        assert rows["vanilla_padded"]["num_identical_rows"] == table["batch"] - 1
        assert rows["vanilla_padded"]["total_tokens_per_second"] == 4 * table["batch"] / 0.5
        assert rows["vanilla_padded"]["decode_tokens_per_second"] is None
        ours, reference = rows["ours_none"], rows["hf_generate"]
        ratio = reference["median_total_seconds"] / ours["median_total_seconds"]
        assert ours["total_speedup"] == pytest.approx(ratio)
        pairs = zip(reference["total_seconds"], ours["total_seconds"], strict=True)
        ratio = statistics.median(theirs / its for theirs, its in pairs)
        assert table["ratios"]["total"]["best of ours / hf_generate"] == pytest.approx(ratio)
    assert record["tables"][0]["candidates"][2]["failure"] is None
    reason = "batch 2: OutOfMemoryError: no room for [2 rows]"
    assert record["tables"][1]["candidates"][2] == {"candidate": "realign", "failure": reason}
    printed = " ".join(capsys.readouterr().out.split())
    assert "NO: 1 of 2 rows differ" in printed
    assert "not timed: batch 2" in printed
    assert "best of ours / hf_generate" in printed
    for path in (plot_path, tmp_path / "speedup_tokens.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_right_tokens_give_a_status_of_zero():
    assert speedup.main(["--shape", "tiny-llama", "--batches", "2", *SHORT, "--candidates", "hf_generate"]) == 0


def test_half_precision_is_not_blamed_for_a_tie(candidates, capsys):
    arguments = [*QUICK, "--dtype", "bfloat16", "--candidates", "hf_generate", "vanilla_padded"]
    assert speedup.main(arguments) == 0
    assert "In bfloat16 rounding may break a tie" in capsys.readouterr().out


def test_a_slow_candidate_is_left_out_of_larger_batches(candidates, tmp_path):
    path = tmp_path / "speedup.json"
    names = ["--candidates", "hf_generate", "vanilla_padded"]
    speedup.main([*QUICK, *names, "--time-limit", "0.49", "--json", str(path)])
    slow = [table["candidates"][1] for table in json.loads(path.read_text())["tables"]]
    assert slow[0]["failure"] is None
    assert slow[1]["failure"] == "batch 1 took 0.5 s a run, more than --time-limit"


def test_rows_are_spread_over_the_prompts():
    assert shapes.spread(range(32), 4) == [0, 8, 16, 24]
    assert shapes.spread("ab", 4) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    "arguments", [["--tokens", "1"], ["--batches", "0"], ["--candidates", "hf_generat"], ["--shape", "opt"]]
)
def test_a_wrong_argument_is_refused(arguments):
    with pytest.raises(SystemExit):
        speedup.parse_arguments(arguments)


def test_nothing_random_is_measured_but_the_demo_model_by_default():
    options = speedup.parse_arguments([])
    assert options.shape == "demo"
    assert options.shape in shapes.NAMES
    assert options.batches == [1, 2, 4, 8, 16, 24]
