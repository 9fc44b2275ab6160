import json

import pytest
import torch

from bench.gpu_suite import trees
from emssd_compile import ops
from tests.ops.ragged import Heads

CPU = torch.device("cpu")
ROWS = [(20, 9), (3, 40)]
HEADS = Heads(4, 2, 16, 16)


def test_the_smoke_run_compares_and_times_every_case(tmp_path, capsys):
    path = tmp_path / "trees.json"
    assert trees.main(["--smoke", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["tables"][0]["rows"]
    assert [(row["case"], row["dtype"]) for row in rows] == [
        (case, dtype) for dtype in ("torch.bfloat16", "torch.float32") for case in ("plain", "window")
    ]
    assert all(row["error"] <= row["limit"] and row["tree_seconds"] > 0 and row["chain_seconds"] > 0 for row in rows)
    assert "WRONG" not in capsys.readouterr().out


def _bits_alone(*tensors, ancestors=None, **options):
    """Tokens past the bits are not seen."""
    if ancestors is not None:
        ancestors = torch.nn.functional.pad(ancestors, (0, 1))
    return ops.ragged_attention(*tensors, ancestors=ancestors, **options)


def _chain(*tensors, ancestors=None, **options):
    return ops.ragged_attention(*tensors, **options)


def _broken(*tensors, **options):
    return ops.ragged_attention(*tensors, **options) * torch.nan


@pytest.mark.parametrize("wrong", [_bits_alone, _chain, _broken])
def test_a_wrong_mask_is_seen_and_shown(wrong):
    verdict = trees.examine(ROWS, HEADS, "plain", CPU, torch.bfloat16, wrong)
    assert not verdict.good
    assert (verdict.error is None) == (wrong is _broken)
    assert [*trees.table([verdict]).columns[-1].cells] == ["WRONG"]


def test_a_wrong_case_fails_the_command(monkeypatch):
    wrong = trees.Verdict("plain", "torch.float32", 1.0, 0.1, 1.0, 1.0)
    monkeypatch.setattr(trees, "examine", lambda *given: wrong)
    assert trees.main(["--smoke"]) == 1
