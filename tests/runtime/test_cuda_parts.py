"""Every drafter, acceptance rule and change of logits on a GPU, in CUDA graphs: the tokens are those of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import emssd_compile
from emssd_compile import placement
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
from emssd_compile.runtime import memory
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
MEMORY: dict[str, dict[str, Any]] = {
    "pool": {"memory": "paged"},
    "small pool": {"kv_tokens": 160},
    "prefix cache": {"prefix_cache": True, "deterministic": False},
}


def _near(model: nn.Module) -> nn.Module:
    """The model with noise on its weights, the same on every device."""
    near, noise = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in near.parameters():
            each = torch.randn(parameter.shape, generator=noise).to(parameter.device)
            parameter.add_(each * parameter.abs().mean() * 0.05)
    return near


def _optimize(
    device: torch.device,
    make: Callable[[nn.Module], Drafter],
    family: Callable[[], nn.Module] = lambda: build(FAMILIES[0]),
    **options: Any,
) -> OptimizedModel:
    """With a lag of one step and sizes to capture, on a CPU, too: which drafts are verified depends on both."""
    model = family().to(device)
    fast = emssd_compile.optimize(model, make(model), backend="eager", **{**SIZES, "prefill_chunk": 48, **options})
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


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("name", ["prompt-lookup", "draft-model-tree"])
def test_blocks(name, options, monkeypatch):
    """Small ones; the second call finds what the first one left, where prefixes are kept."""
    monkeypatch.setattr(memory, "BLOCK_SIZE", 8)
    _compare(lambda model: NEAR[name](_near(model)), (*WAYS, *WAYS), **options)


@pytest.mark.parametrize("name", ["prompt-lookup", "draft-model-tree"])
def test_keys_and_values_in_8_bits(name):
    _compare(lambda model: NEAR[name](_near(model)), kv_dtype="int8")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(("name", "chunk"), [("prompt-lookup", 16), ("draft-model-tree", 40)])
def test_rings(name, chunk, backend, monkeypatch):
    """Of one layer with a window, beside one that sees all; texts go around several times."""
    monkeypatch.setattr(memory, "BLOCK_SIZE", 4)
    plan = mock.patch.object(
        placement, "plan_rings", lambda *given, **named: memory.plan_rings(*given, **{**named, "is_asked_for": True})
    )

    def family() -> nn.Module:
        return build("gemma2", sliding_window=7)

    def make(model: nn.Module) -> Drafter:
        return NEAR[name](_near(model))

    with plan:
        here = _optimize(torch.device("cpu"), make, family, prefill_chunk=chunk)
        model = family().to(CUDA)
        fast = emssd_compile.optimize(model, make(model), backend=backend, prefill_chunk=chunk, **SIZES)
        assert fast._engine.variant.signature.with_role("ring")
        for way in WAYS:
            assert fast.generate(PROMPTS, **way) == here.generate(PROMPTS, **way)


@pytest.mark.parametrize("memory_kind", ["slab", "paged"])
def test_blocks_compiled(memory_kind):
    eager = _optimize(torch.device("cpu"), lambda model: PromptLookup(4))
    model = build(FAMILIES[0]).to(CUDA)
    fast = emssd_compile.optimize(model, PromptLookup(4), backend="inductor", memory=memory_kind, **SIZES)
    for way in WAYS:
        assert fast.generate(PROMPTS, **way) == eager.generate(PROMPTS, **way)


def test_requests_of_a_session_come_and_go():
    here, there = (_optimize(device, lambda model: PromptLookup(4)) for device in (torch.device("cpu"), CUDA))
    expected = here.generate(PROMPTS, max_new_tokens=NEW)
    with there.session() as session:
        handles = [session.submit(prompt, max_new_tokens=NEW) for prompt in [*PROMPTS, *PROMPTS[::-1]]]
        handles[1].cancel()
        texts = [handle.result() for index, handle in enumerate(handles) if index != 1]
    wanted = [*expected, *expected[::-1]]
    assert texts == [text for index, text in enumerate(wanted) if index != 1]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_weights_that_changed_are_noticed(backend):
    """In place, as an optimizer does, and where they lie elsewhere afterwards: captured steps hold addresses."""
    tokens = []
    for device in (torch.device("cpu"), CUDA):
        model = build(FAMILIES[0]).to(device)
        fast = emssd_compile.optimize(model, "prompt-lookup", backend=backend, **SIZES)
        said = [fast.generate(PROMPTS, max_new_tokens=NEW)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-0.9)
        said.append(fast.generate(PROMPTS, max_new_tokens=NEW))
        model.load_state_dict({n: v.clone() * -1.1 for n, v in model.state_dict().items()}, assign=True)
        fast.refresh()
        said.append(fast.generate(PROMPTS, max_new_tokens=NEW))
        tokens.append(said)
    assert tokens[0] == tokens[1]
    assert tokens[0][0] != tokens[0][1] != tokens[0][2]


def test_heads_compiled():
    eager = _optimize(torch.device("cpu"), lambda model: in_turn(FAMILIES[0], FEW))
    model = build(FAMILIES[0]).to(CUDA)
    fast = emssd_compile.optimize(model, in_turn(FAMILIES[0], FEW), backend="inductor", **SIZES)
    for way in WAYS:
        assert fast.generate(PROMPTS, **way) == eager.generate(PROMPTS, **way)
