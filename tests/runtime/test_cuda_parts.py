"""Every drafter, acceptance rule and change of logits on a GPU, in CUDA graphs: the tokens are those of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import emssd_compile
from emssd_compile.acceptance import RULES
from emssd_compile.drafters import (
    Corpus,
    Drafter,
    DraftModel,
    EarlyExit,
    Hybrid,
    MultiCandidate,
    PromptLookup,
    SuffixLookup,
    TargetInitialized,
)
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.buckets import decode_buckets
from emssd_compile.step.proposals import misfit
from tests.exactness.models import build
from tests.exactness.trained_heads import (
    CASES,
    FAMILIES,
    FEW,
    NEW,
    PROMPTS,
    ROWS,
    SAMPLING,
    SIZES,
    in_turn,
    learn,
    make_head,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = torch.device("cuda")
WAYS: tuple[dict[str, Any], ...] = ({"max_new_tokens": NEW}, SAMPLING, {**SAMPLING, "do_sample": [True, False] * 2})
NEAR: dict[str, Callable[[nn.Module], Drafter]] = {
    "prompt-lookup": lambda near: PromptLookup(4),
    "draft-model": lambda near: DraftModel(near, 4),
    "draft-model-tree": lambda near: DraftModel(near, tree=(3, 1, 2)),
    "multi-candidate": lambda near: MultiCandidate(near, (3, 1, 2), threshold=0.05),
    "target-initialized": lambda near: TargetInitialized(near, 4, 3, threshold=0.0005),
    "suffix": lambda near: SuffixLookup(4, corpus=Corpus(capacity_tokens=256)),
    "early-exit": lambda near: EarlyExit(1, tree=(2, 1)),
    "hybrid": lambda near: Hybrid(PromptLookup(4), DraftModel(near, 3)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "bans": {"no_repeat_ngram_size": 2, "bad_words_ids": [[5], [7, 8]], "suppress_tokens": [11], "min_new_tokens": 3},
    "biases": {"logit_bias": {3: 1.5, 9: -2.0}, "sequence_bias": [[[4, 6], 2.0]], "eos_token_id": [17]},
    "filters": {**SAMPLING, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
    "cut-offs": {**SAMPLING, "top_k": 0, "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3, "top_h": 0.6},
}


def _near(model: nn.Module) -> nn.Module:
    """The model with noise on its weights, the same on every device."""
    near, noise = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in near.parameters():
            each = torch.randn(parameter.shape, generator=noise).to(parameter.device)
            parameter.add_(each * parameter.abs().mean() * 0.05)
    return near


def _optimize(device: torch.device, make: Callable[[nn.Module], Drafter], **options: Any) -> OptimizedModel:
    """With a lag of one step and sizes to capture, on a CPU, too: which drafts are verified depends on both."""
    model = build(FAMILIES[0]).to(device)
    fast = emssd_compile.optimize(model, make(model), backend="eager", prefill_chunk=48, **{**SIZES, **options})
    fast._engine.lag = 1
    fast._engine.launcher.buckets = decode_buckets(ROWS, fast._engine.num_draft_tokens)
    return fast


def _compare(make: Callable[[nn.Module], Drafter], ways: tuple[dict[str, Any], ...] = WAYS, **options: Any) -> None:
    here, there = (_optimize(device, make, **options) for device in (torch.device("cpu"), CUDA))
    for way in ways:
        expected = here.generate(PROMPTS, **way)
        assert there.generate(PROMPTS, **way) == expected
    assert there.stats.num_accepted_draft_tokens == here.stats.num_accepted_draft_tokens
    assert there.stats.num_draft_tokens == here.stats.num_draft_tokens > 0


@pytest.mark.parametrize("name", NEAR)
def test_drafters(name):
    _compare(lambda model: NEAR[name](_near(model)))


@pytest.mark.parametrize("case", CASES)
def test_heads(case):
    head = make_head(FAMILIES[0], case)
    learn(head, FAMILIES[0])
    _compare(lambda model: copy.deepcopy(head))


@pytest.mark.parametrize("rule", [name for name in RULES if name != "greedy"])
def test_rules_that_draw(rule):
    def make(model: nn.Module) -> DraftModel:
        tree = DraftModel(_near(model), tree=(2, 2))
        return DraftModel(_near(model), 3) if misfit(RULES[rule](), tree) else tree

    _compare(make, WAYS[1:], acceptance=rule)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_changes_of_logits(options):
    _compare(lambda model: DraftModel(_near(model), tree=(2, 2)), ({"max_new_tokens": NEW, **options},))


@pytest.mark.parametrize("layout", ["padded", "auto"])
def test_layouts(layout):
    _compare(lambda model: DraftModel(_near(model), tree=(2, 2)), layout=layout)


def test_heads_compiled():
    eager = _optimize(torch.device("cpu"), lambda model: in_turn(FAMILIES[0], FEW))
    model = build(FAMILIES[0]).to(CUDA)
    fast = emssd_compile.optimize(model, in_turn(FAMILIES[0], FEW), backend="inductor", **SIZES)
    for way in WAYS:
        assert fast.generate(PROMPTS, **way) == eager.generate(PROMPTS, **way)
