"""`bench.draft_share`: a stand-in verifies what the head does, and a head that takes long is said to."""

import json

import torch

from bench import draft_share, shapes
from emssd_compile.drafters.medusa import Medusa
from emssd_compile.drafters.medusa_config import MedusaConfig
from tests.export.subjects import VOCABULARY, WIDTH, Small


def test_time_that_goes_into_drafting_is_told_apart(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    Medusa(MedusaConfig(WIDTH, VOCABULARY, num_heads=2), tree=(2, 2)).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(shapes, "build", lambda *how: Small())
    monkeypatch.setattr(shapes, "demo_prompts", lambda: [[n % VOCABULARY, 1, 2] for n in range(8)])
    made = draft_share.step_seconds
    stand_ins = []

    def slow(fast, *rest):
        if isinstance(fast.drafter, draft_share.StandIn):
            stand_ins.append(fast)
            return made(fast, *rest)
        return made(fast, *rest) + 1.0

    monkeypatch.setattr(draft_share, "step_seconds", slow)
    path = tmp_path / "share.json"
    command = ["--heads", str(tmp_path / "tiny"), "--batches", "3", "--tokens", "20", "--repeats", "1"]
    draft_share.main([*command, "--backend", "eager", "--json", str(path)])
    (row,) = json.loads(path.read_text())["tables"][0]["rows"]
    stats = stand_ins[-1].stats
    assert row["num_verified"] == stats.num_draft_tokens / stats.num_spec_steps, "those of the head"
    assert row["step_seconds"] > 1 > row["stand_in_seconds"] > 0
    assert row["share"] == 1 - row["stand_in_seconds"] / row["step_seconds"]
    assert "drafting" in capsys.readouterr().out
