"""Layers that see no further than a window keep it in rings: tokens are those of slabs, and the model's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import EarlyExit
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime import memory
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import CAPACITY, LENGTHS, NEW_TOKENS, Target, assert_exact, rechunked, target
from tests.exactness.models import prompt
from tests.runtime.engines import graph_engine
from tests.runtime.tape import TapeDevice
from tests.zoo import toy_model

ROWS, SIZE, WINDOW = 2, 4, 7
"""Rows, tokens of a block and of a window: so few that texts go around several times."""
DRAFTERS = ("sometimes-wrong", "random-tree")
OTHERS = ("none", "prompt-lookup", "draft-model", "draft-model-tree")
"""The first are tried each time, the others if --long."""
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 25}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK_SIZE", SIZE)


def mixed() -> Target:
    """Of one layer with a window, and one that sees all."""
    return target("gemma2", ROWS, sliding_window=WINDOW)


def rings(fast: OptimizedModel) -> list[str]:
    return sorted(fast._engine.variant.signature.with_role("ring"))


def in_memory(fast: OptimizedModel, kind: str, **options: Any) -> OptimizedModel:
    return OptimizedModel(fast.model, fast._step, replace(fast.options, memory=kind, **options))


def long(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.long)


@pytest.mark.parametrize("drafter", [*DRAFTERS, *map(long, OTHERS)])
def test_tokens_are_the_models_own(drafter: str):
    """More prompts than rows, of all lengths; long ones come in chunks."""
    compiled = mixed()
    fast = compiled.optimize(compiled.drafter(drafter))
    assert rings(fast) == ["k_cache_0", "v_cache_0"]
    assert fast._make.placement.rings is not None
    assert fast._make.placement.rings.size("k_cache_0") < CAPACITY / 2
    assert_exact(fast, compiled.reference, [prompt(n) for n in LENGTHS], NEW_TOKENS)
    assert (fast.stats.num_accepted_draft_tokens > 0) == (drafter != "none")
    assert_exact(rechunked(fast, 19), compiled.reference, [prompt(n) for n in LENGTHS[::-1]], NEW_TOKENS)


@pytest.mark.parametrize("tree", [(3, 1, 2), long(None)])
def test_a_drafter_that_writes_to_the_targets_caches(tree: tuple[int, ...] | None):
    """The layer that drafts is the one whose cache is a ring: what it writes there is mostly rejected."""
    compiled = mixed()
    fast = compiled.optimize(EarlyExit(1, tree=tree))
    assert rings(fast)
    assert_exact(fast, compiled.reference, [prompt(n) for n in LENGTHS], NEW_TOKENS)
    assert 0 < fast.stats.draft_acceptance_rate < 1


@pytest.mark.parametrize("drafter", ["random-tree", long("sometimes-wrong")])
def test_logits_have_the_bits_of_slabs(drafter: str):
    compiled = mixed()
    fast = compiled.optimize(compiled.drafter(drafter))
    prompts = [prompt(n) for n in (61, 2, 70, 33)]
    options: Any = {"max_new_tokens": 25, "output_logits": True, "return_dict_in_generate": True}
    here, there = (each.generate(prompts, **options) for each in (fast, in_memory(fast, "slab")))
    assert here.sequences == there.sequences
    assert all(torch.equal(own, other) for own, other in zip(here.logits, there.logits, strict=True))


@pytest.mark.parametrize("drafter", ["random-tree", long("prompt-lookup")])
def test_sequences_of_one_prompt(drafter: str):
    """A row is a source while it has what is seen from the prompt's end on; then the prompt is read anew."""
    compiled = mixed()
    fast = compiled.optimize(compiled.drafter(drafter))
    options = {**SAMPLING, "num_return_sequences": 4, "seed": 5}
    prompts = [prompt(n) for n in (33, 1, 17, 61)]
    there = in_memory(fast, "slab")
    assert fast.generate(prompts, **options) == there.generate(prompts, **options)
    assert there.stats.num_fed_tokens < fast.stats.num_fed_tokens < there.stats.num_fed_tokens + 3 * (33 + 17 + 61)


@pytest.mark.parametrize("drafter", ["random-tree", long("sometimes-wrong")])
def test_where_the_host_is_a_step_behind(drafter: str):
    compiled = mixed()
    engine = graph_engine(compiled.optimize(compiled.drafter(drafter)), 19, TapeDevice())
    for lengths in (LENGTHS[:7], LENGTHS[7:]):
        requests = [Request(index, torch.tensor(prompt(n)), NEW_TOKENS) for index, n in enumerate(lengths)]
        list(engine.run(requests))
        assert [r.output for r in requests] == [compiled.reference(prompt(n), NEW_TOKENS) for n in lengths]


def test_a_session_on_rings():
    """Requests come while others decode, and some are cancelled; the others are right."""
    compiled = mixed()
    fast = compiled.optimize(compiled.drafter("sometimes-wrong"))
    with fast.session() as session:
        streams = [session.submit(prompt(n), max_new_tokens=NEW_TOKENS) for n in LENGTHS]
        streams[4].cancel()
        for n, stream in zip(LENGTHS, streams, strict=True):
            expected = [*prompt(n), *compiled.reference(prompt(n), NEW_TOKENS)]
            assert stream.result() == (expected[: len(stream.result())] if stream is streams[4] else expected)


def test_other_forms_of_the_step():
    """One that is cut in two, and one with more in it, on the same rings."""
    compiled = mixed()
    fast = compiled.optimize(compiled.drafter("draft-model-tree"))
    prompts = [prompt(n) for n in (20, 1, 61, 7)]
    plain = fast.generate(prompts, max_new_tokens=12)
    assert fast.generate(prompts, max_new_tokens=12, logits_hook=lambda context: context.logits) == plain
    assert fast.generate(prompts, max_new_tokens=12, repetition_penalty=1.0001) == plain
    assert plain == [[*ids, *compiled.reference(ids, 12)] for ids in prompts]


def test_the_other_layers_may_be_in_a_pool(monkeypatch: pytest.MonkeyPatch):
    """Slabs of what sees all do not fit."""
    compiled = mixed()
    fast = compiled.optimize(compiled.drafter("random-tree"))
    monkeypatch.setattr(memory, "available_memory", lambda device: 100 << 10)
    monkeypatch.setattr(memory, "_POOL_SHARE", 1)
    here = in_memory(fast, "auto")
    assert rings(here) == ["k_cache_0", "v_cache_0"]
    assert [*here._engine.variant.signature.with_role("pool")] == ["k_cache_1", "v_cache_1"]
    assert "a pool of" in here.explain().memory
    assert "rings of" in here.explain().memory
    assert_exact(here, compiled.reference, [prompt(n) for n in LENGTHS], NEW_TOKENS)
    options = {**SAMPLING, "num_return_sequences": 4, "seed": 5}
    assert here.generate([prompt(33)], **options) == fast.generate([prompt(33)], **options)
    assert here.stats.num_shared_blocks > 0


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("mistral", {"sliding_window": WINDOW}),
        long("gpt_oss", {"sliding_window": WINDOW}),
        long("gemma3_text", {"sliding_window": WINDOW}),
        long("llama4_text", {"attention_chunk_size": WINDOW}),
    ],
)
def test_tokens_of_other_models_are_their_own(architecture: str, overrides: dict[str, Any]):
    """Windows everywhere, sinks, chunks."""
    compiled = target(architecture, ROWS, **overrides)
    fast = compiled.optimize(compiled.drafter("sometimes-wrong"))
    assert rings(fast)
    assert_exact(fast, compiled.reference, [prompt(n) for n in LENGTHS], NEW_TOKENS)


def test_inductor_runs_the_same_step():
    model = toy_model("gemma2", sliding_window=WINDOW)
    sizes: dict[str, Any] = {"max_batch": 2, "max_length": 90, "prefill_chunk": 16}
    prompts = [prompt(n) for n in (61, 5, 33)]
    fast = emssd_compile.optimize(model, **sizes)
    slabs = emssd_compile.optimize(model, backend="eager", memory="slab", **sizes)
    assert rings(fast)
    assert fast.generate(prompts, max_new_tokens=25) == slabs.generate(prompts, max_new_tokens=25)
