"""`bench.peers` with fake peers: one table of those that take part, and reasons for the others."""

import json

import pytest

from bench.peers import __main__ as peers
from bench.peers import registry
from bench.peers.registry import PEERS, WAYS, Peer, Way
from emssd_compile.errors import OptionError

QUICK = ["--models", "tiny-llama", "--batches", "1", "2", "--tokens", "4", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch, tmp_path):
    monkeypatch.setenv("EMSSD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(PEERS, "fake", Peer("tests.bench.peers.fake_worker"))
    for name in ("hf_generate", "ours_none"):
        monkeypatch.setitem(WAYS, name, Way("fake", candidate="right"))
    for name in ("wrong", "unready", "failing"):
        monkeypatch.setitem(WAYS, name, Way("fake", candidate=name))


def test_those_that_take_part_have_figures_and_the_others_a_reason(tmp_path, capsys):
    path = tmp_path / "peers.json"
    ways = ["hf_generate", "ours_none", "wrong", "failing", "unready", "openvino"]
    peers.main([*QUICK, "--dtypes", "float32", "--ways", *ways, "--json", str(path)])
    record = json.loads(path.read_text())
    (table,) = record["tables"]
    assert (table["title"], record["threads"]) == ("tiny-llama, float32", 2)
    rows = {(row["way"], row["batch"]): row for row in table["rows"]}
    both = [(way, batch) for batch in (1, 2) for way in ways[:3]]
    assert sorted(rows) == sorted([*both, ("failing", 1)])
    assert [rows[place]["equal_rows"] for place in both] == [1, 1, 0, 2, 2, 1]
    assert all(row["over_reference"] > 0 and row["over_ours"] > 0 and row["peak"] > 0 for row in rows.values())
    failures = {way["way"]: way["failure"] for way in table["ways"]}
    assert failures == {
        "hf_generate": None,
        "ours_none": None,
        "wrong": None,
        "failing": "batch 2: RuntimeError: one row only",
        "unready": "RuntimeError: too small a machine",
        "openvino": "not installed: python -m bench.peers --install openvino",
    }
    starts = {way["way"]: len(way["ready_seconds"]) for way in table["ways"]}
    assert [starts[way] for way in ways] == [2, 2, 2, 2, 0, 0]
    assert "rows with the tokens of ours" in capsys.readouterr().out


def test_a_dtype_that_a_peer_cannot_hold_is_said(capsys):
    peers.main([*QUICK, "--dtypes", "bfloat16", "--ways", "wrong"])
    assert "ValueError: it has no bfloat16" in capsys.readouterr().out


def test_installing_is_all_that_is_done_and_a_failure_ends_it(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(registry, "install", asked.append)
    peers.main(["--install", "openvino", "llama_cpp"])
    assert asked == ["openvino", "llama_cpp"]

    def refuse(name):
        raise OptionError(f"{name} was not installed")

    monkeypatch.setattr(registry, "install", refuse)
    with pytest.raises(SystemExit, match="openvino was not installed"):
        peers.main(["--install", "openvino"])
