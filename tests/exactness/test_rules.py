"""Every acceptance rule that draws makes the same tokens eager, compiled and in an artifact."""

from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.acceptance import RULES
from emssd_compile.decoder import Decoder
from emssd_compile.drafters import DraftModel
from emssd_compile.step.proposals import misfit
from tests.export.subjects import ROWS, Small, export, prompt

PROMPTS = [prompt(n) for n in (3, 1, 12, 7)]
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 11, "max_new_tokens": 40}
SIZES: dict[str, Any] = {"max_batch": ROWS, "max_length": 64, "layout": "packed", "deterministic": True}
DRAWING = [name for name, rule in RULES.items() if name != "greedy"]


def _drafter(rule: str) -> DraftModel:
    """A model that is nearly the target: drafts are accepted and refused. Trees, unless the rule is for chains."""
    near, other = Small(), Small(seed=1)
    with torch.no_grad():
        for parameter, away in zip(near.parameters(), other.parameters(), strict=True):
            parameter.lerp_(away, 0.1)
    tree = DraftModel(near, tree=(2, 2))
    return DraftModel(near, 3) if misfit(RULES[rule](), tree) else tree


@pytest.mark.parametrize(
    ("rule", "target"),
    [
        pytest.param(rule, target, marks=() if (rule, target) == ("token-level", "onnx") else pytest.mark.long)
        for rule in DRAWING
        for target in ("onnx", "aot", "inductor")
    ],
)
def test_the_same_tokens_are_drawn(rule, target):
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    eager = emssd_compile.optimize(Small(), _drafter(rule), acceptance=rule, backend="eager", **SIZES)
    other: Decoder
    if target == "inductor":
        other = emssd_compile.optimize(Small(), _drafter(rule), acceptance=rule, backend="inductor", **SIZES)
    else:
        other = emssd_compile.load(export(target, rule, eager, row_options=["do_sample", "temperature", "top_p"]))
    expected = eager.generate(PROMPTS, **SAMPLING)
    assert 1.1 < eager.stats.mean_acceptance_length < 3, "drafts are accepted, and refused"
    assert other.generate(PROMPTS, **SAMPLING) == expected
    assert other.stats == eager.stats
