import json

import pytest
import torch
from torch import nn

from bench import roofline


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(10, 4), nn.Embedding(100, 4)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_weights_that_a_step_reads_by_hand():
    # The layer's 16 + 4 and the head's 40 in 4 bytes; embeddings are looked up, unless the head is one of them.
    assert roofline.weight_bytes(Tied(tied=False)) == (20 + 40) * 4
    assert roofline.weight_bytes(Tied(tied=True)) == (20 + 40) * 4
    assert roofline.weight_bytes(Tied(tied=False).half()) == (20 + 40) * 2


def test_the_floor_by_hand():
    # 1000 bytes of weights and 2 rows of 25 tokens, 10 bytes each, at 100 bytes a second.
    floor = roofline.floor_seconds(1000, 10, 2 * 25, 100.0)
    assert floor == 15.0
    step = roofline.MeasuredStep(drafts=7, batch=2, context=25, seconds=60.0, floor_seconds=floor)
    assert (step.tokens, step.times_floor) == (16, 4.0)


def test_the_command_measures_both_steps_everywhere(tmp_path, capsys):
    path = tmp_path / "roofline.json"
    sizes = ["--batches", "1", "3", "--contexts", "20", "--steps", "4", "--drafts", "2", "--repeats", "1"]
    roofline.main(["--shape", "tiny-llama", "--backend", "eager", *sizes, "--json", str(path)])
    saved = json.loads(path.read_text())
    assert saved["versions"]["torch"] == torch.__version__
    steps, attention = saved["tables"]
    assert [(row["batch"], row["tokens"]) for row in steps["rows"]] == [(1, 1), (1, 3), (3, 3), (3, 9)]
    for row in steps["rows"]:
        assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
    # Of a token: 2 layers, K and V, 2 heads of 16, float32. Four steps are timed, behind K + 2 others.
    read = [row["floor_seconds"] * steps["bandwidth_bytes_per_second"] for row in steps["rows"]]
    for drafts, begin in enumerate((22, 24)):
        context = sum(range(begin, begin + 4)) / 4
        assert read[2 + drafts] - read[drafts] == pytest.approx(2 * context * (2 * 2 * 2 * 16 * 4))
    assert {(row["heads"], row["kv_heads"], row["head_size"]) for row in attention["rows"]} == {(4, 2, 16)}
    assert "× floor" in capsys.readouterr().out
