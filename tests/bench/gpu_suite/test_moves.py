import json

import pytest
import torch

from bench.gpu_suite import moves
from emssd_compile.ops import _move_kv

CPU = torch.device("cpu")
CASE = moves.Case(rows=2, depth=3, context=5, kv_heads=2, head_size=8)


def test_bytes_by_hand():
    # In and out, 2 rows x 2 tokens besides the root, keys and values of 2 heads x 8.
    assert CASE.num_bytes(itemsize=4) == 2 * (2 * 2) * (2 * 2 * 8) * 4


def test_the_smoke_run_compares_and_times_every_form(tmp_path, capsys):
    path = tmp_path / "moves.json"
    assert moves.main(["--smoke", "--repeats", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["tables"][0]["rows"]
    assert [(row["dtype"], row["form"]) for row in rows] == [
        (dtype, form) for dtype in ("torch.bfloat16", "torch.float32") for form in ("op", "reference")
    ]
    assert all(row["identical"] and row["seconds"] > 0 and row["rows"] == 3 for row in rows)
    assert "WRONG" not in capsys.readouterr().out


def test_figures_go_with_the_time():
    verdict = moves.examine(CASE, CPU, torch.float32, 1e10, "reference", _move_kv.reference)
    assert verdict.identical
    assert verdict.bytes_per_second == pytest.approx(CASE.num_bytes(4) / verdict.seconds)
    assert verdict.bandwidth_share == pytest.approx(verdict.bytes_per_second / 1e10)


def _nothing(*tensors):
    pass


def _descending(k_cache, v_cache, starts, path, counts):
    for depth in range(path.shape[1] - 1, -1, -1):
        for cache in (k_cache, v_cache):
            cache[:, int(starts[0]) + depth] = cache[:, int(starts[0]) + int(path[0, depth])]


def _too_much(k_cache, v_cache, starts, path, counts):
    _move_kv.reference(k_cache, v_cache, starts, path, counts)
    v_cache[:, 0] = 0


@pytest.mark.parametrize("wrong", [_nothing, _descending, _too_much])
def test_a_wrong_move_is_seen_and_shown(wrong):
    verdict = moves.examine(CASE, CPU, torch.float32, 1e10, "wrong", wrong)
    assert not verdict.identical
    assert [*moves.table([verdict], 1e10).columns[-1].cells] == ["WRONG"]


def test_a_wrong_case_fails_the_command(monkeypatch):
    wrong = moves.Verdict(CASE, "torch.float32", "op", False, 1.0, 1.0, 1.0)
    monkeypatch.setattr(moves, "examine", lambda *given: wrong)
    monkeypatch.setattr(moves, "memory_bandwidth", lambda device, repeats: 1e10)
    assert moves.main(["--smoke"]) == 1
