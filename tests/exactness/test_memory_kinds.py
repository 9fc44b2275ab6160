"""Where keys and values are changes no token: rows on a pool of blocks give what rows with slabs give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.errors import CapacityError
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.pages import Pages
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import CAPACITY, LENGTHS, NEW_TOKENS, assert_exact, rechunked, target
from tests.exactness.models import prompt
from tests.exactness.pools import paged, watched_pools
from tests.exactness.trained_heads import NEW, PROMPTS, expected_texts, learn, make_head
from tests.export import subjects
from tests.runtime.engines import graph_engine
from tests.runtime.tape import TapeDevice

ROWS, SIZE = 3, 8
"""Rows, and tokens of a block: far fewer than in use, so that texts have many."""
DRAFTERS = ("prompt-lookup", "draft-model-tree", "sometimes-wrong", "random-tree")
OTHERS = ("none", "draft-model", "multi-candidate", "always-right-tree")
"""The first are tried each time, the others if --long."""


def often(chosen: Iterable[str], others: Iterable[str]) -> list[Any]:
    return [*chosen, *(pytest.param(name, marks=pytest.mark.long) for name in others)]


SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 12}


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with watched_pools(monkeypatch, SIZE):
        yield


def _engine(fast: OptimizedModel) -> tuple[Engine, Pages]:
    pages = fast._engine.memory
    assert isinstance(pages, Pages)
    return fast._engine, pages


@pytest.mark.parametrize("drafter", often(DRAFTERS, OTHERS))
def test_tokens_are_the_models_own(drafter):
    """More prompts than rows, in chunks, in a pool that has not enough for all rows at once."""
    compiled = target("llama", ROWS)
    fast = compiled.optimize(compiled.drafter(drafter))
    prompts = [prompt(n) for n in LENGTHS]
    on_blocks = paged(fast, 150)
    assert "pool of" in on_blocks.explain().memory
    assert_exact(on_blocks, compiled.reference, prompts, NEW_TOKENS)
    assert (on_blocks.stats.num_accepted_draft_tokens > 0) == (drafter != "none")
    assert_exact(paged(rechunked(fast, 24)), compiled.reference, prompts[::-1], NEW_TOKENS)


@pytest.mark.parametrize("architecture", often(["mistral", "own-positions"], ["gpt2", "gemma", "bloom"]))
def test_tokens_of_other_models_are_their_own(architecture):
    """Learned positions, windows, ALiBi, and what a model makes up."""
    compiled = target(architecture, ROWS)
    fast = paged(compiled.optimize(compiled.drafter("draft-model-tree"), prefill_chunk=30), 200)
    assert_exact(fast, compiled.reference, [prompt(n) for n in (5, 70, 1, 33, 61)], NEW_TOKENS)


@pytest.mark.parametrize("drafter", often(["draft-model", "random-tree"], ["none", "draft-model-tree"]))
def test_where_the_host_is_a_step_behind(drafter):
    """As on a GPU: what a row may come to hold is known as a bound only."""
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter(drafter)), 200)
    engine = graph_engine(fast, 24, TapeDevice())
    for _ in engine.capture():
        pass
    for lengths in (LENGTHS[:5], LENGTHS[5:10]):
        requests = [Request(index, torch.tensor(prompt(n)), NEW_TOKENS) for index, n in enumerate(lengths)]
        list(engine.run(requests))
        assert [r.output for r in requests] == [compiled.reference(prompt(n), NEW_TOKENS) for n in lengths]


@pytest.mark.parametrize("case", often(["eagle3-tree"], ["block-tree", "eagle3", "mtp-modules", "peagle"]))
def test_heads_with_caches_of_their_own(case):
    head = make_head("llama", case)
    learn(head, "llama")
    fast = target("llama", ROWS).optimize(head, prefill_chunk=24)
    slabs = fast.generate(PROMPTS[2:3], num_return_sequences=4, seed=1, **SAMPLING)
    on_blocks = paged(fast)
    assert not on_blocks._engine.variant.signature.with_role("cache")
    assert on_blocks.generate(PROMPTS, max_new_tokens=NEW) == expected_texts("llama")
    assert on_blocks.stats.mean_acceptance_length > 1.5
    assert on_blocks.generate(PROMPTS[2:3], num_return_sequences=4, seed=1, **SAMPLING) == slabs
    assert on_blocks.stats.num_shared_blocks > 0


@pytest.mark.parametrize("drafter", often(["none", "draft-model-tree"], ["prompt-lookup", "always-right-tree"]))
def test_sequences_of_one_prompt_share_its_blocks(drafter):
    """The full ones, by reference; but a draft model reads prompts itself, and so has blocks of its own."""
    compiled = target("llama", ROWS)
    fast = compiled.optimize(compiled.drafter(drafter))
    prompts = [prompt(n) for n in (33, 1, 17, 7 * SIZE + 1)]
    options = {**SAMPLING, "num_return_sequences": 4, "seed": 5}
    slabs = fast.generate(prompts, **options)
    on_blocks = paged(fast, 150)
    assert on_blocks.generate(prompts, **options) == slabs
    if drafter == "draft-model-tree":
        assert on_blocks.stats.num_shared_blocks == 0
    else:
        assert on_blocks.stats.num_shared_blocks >= 2 * 7
    on_blocks.stats.reset()
    assert on_blocks.stats.num_shared_blocks == 0


def test_what_is_shared_is_promised_once():
    """Two sequences of a long prompt run side by side in a pool that could not hold it twice."""
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter("none")), 15 * SIZE)
    prompts = [prompt(9 * SIZE + 1)]
    engine, pages = _engine(fast)
    most = 0
    requests = [Request(index, torch.tensor(prompts[0]), 6, group=0) for index in range(3)]
    for _ in engine.run(requests):
        most = max(most, len(pages._held))
    assert most == 3
    assert [request.output for request in requests] == [compiled.reference(prompts[0], 6)] * 3


def test_requests_wait_for_blocks_and_start_in_their_order():
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter("sometimes-wrong")), 13 * SIZE)
    engine, pages = _engine(fast)
    lengths = (61, 5, 70, 3, 11)  # 11 blocks with what follows, 4, 12, 3 and 4
    requests = [Request(index, torch.tensor(prompt(n)), NEW_TOKENS) for index, n in enumerate(lengths)]
    order: list[int] = []
    for request in engine.run(requests):
        order += [request.index] if request.index not in order else []
        assert len(pages._held) <= 2
    assert order == [0, 1, 2, 3, 4], "who needs little does not overtake who waits"
    assert [r.output for r in requests] == [compiled.reference(prompt(n), NEW_TOKENS) for n in lengths]


@pytest.mark.parametrize("drafter", ["prompt-lookup", "draft-model-tree"])
def test_rows_that_are_ended_early_give_their_blocks_back(drafter):
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter(drafter)), 26 * SIZE)
    for engine in (fast._engine, graph_engine(fast, 24, TapeDevice())):
        requests = [Request(index, torch.tensor(prompt(n)), NEW_TOKENS) for index, n in enumerate(LENGTHS[:10])]
        for request in engine.run(requests):
            if request.index % 3 == 0 and len(request.output) >= 2:
                request.end(2)
        for request, n in zip(requests, LENGTHS, strict=False):
            expected = compiled.reference(prompt(n), NEW_TOKENS)
            assert request.output == (expected[:2] if request.index % 3 == 0 else expected)
        run = engine.run([Request(0, torch.tensor(prompt(9)), NEW_TOKENS)])
        next(run)
        run.close()  # the consumer has had enough


def test_a_text_that_is_stopped_by_an_error_leaves_no_block_behind():
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter("prompt-lookup")))

    def fail(ids: object, scores: object) -> bool:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fast.generate([prompt(20)] * 2, max_new_tokens=9, stopping_criteria=[fail])
    assert_exact(fast, compiled.reference, [prompt(20), prompt(40)], 9)


def test_python_between_the_halves_and_other_forms():
    """A step that is cut in two, and one with more in it, on the same pool."""
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter("draft-model-tree")))
    prompts = [prompt(n) for n in (20, 1, 40, 7)]
    plain = fast.generate(prompts, max_new_tokens=12)
    assert fast.generate(prompts, max_new_tokens=12, logits_hook=lambda context: context.logits) == plain
    assert fast.generate(prompts, max_new_tokens=12, repetition_penalty=1.0001) == plain
    assert plain == [[*ids, *compiled.reference(ids, 12)] for ids in prompts]


def test_a_session_on_blocks():
    """Requests come, wait for blocks, are cancelled; the others are right."""
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter("sometimes-wrong")), 11 * SIZE)
    with fast.session() as session:
        streams = [session.submit(prompt(n), max_new_tokens=NEW_TOKENS) for n in LENGTHS[:-1]]
        streams[4].cancel()
        with pytest.raises(CapacityError, match=r"take 12 blocks of 8 tokens, and the pool has 11, 88 tokens for all"):
            session.submit(prompt(70), max_new_tokens=CAPACITY - 70)
        for n, stream in zip(LENGTHS, streams, strict=False):
            expected = [*prompt(n), *compiled.reference(prompt(n), NEW_TOKENS)]
            assert stream.result() == (expected[: len(stream.result())] if stream is streams[4] else expected)


def test_what_can_never_fit_is_refused_before_any_work():
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter("none")), 10 * SIZE)
    remedy = r"pass max_new_tokens=10 or less, or compile with optimize\(model, kv_tokens=88\) or more"
    with pytest.raises(CapacityError, match=rf"request 1: 70 prompt tokens and 12 new ones take 11 blocks.*{remedy}"):
        fast.generate([prompt(3), prompt(70)], max_new_tokens=12)
    with pytest.raises(CapacityError, match=r"pool has 10, 80 tokens for all rows; compile with"):
        fast.generate([prompt(81)], max_new_tokens=1)
    assert fast.stats.num_steps == 0
    assert_exact(fast, compiled.reference, [prompt(70)], 10)


def test_inductor_runs_the_same_step():
    prompts = [subjects.prompt(n) for n in (20, 5, 33)]
    sizes: dict[str, Any] = {"max_batch": 2, "max_length": 64}
    drafter = subjects.drafter("forks")
    slabs = emssd_compile.optimize(subjects.Small(), drafter, backend="eager", memory="slab", **sizes)
    fast = emssd_compile.optimize(subjects.Small(), drafter, **sizes, kv_tokens=2 * 64)
    assert fast.generate(prompts, max_new_tokens=12) == slabs.generate(prompts, max_new_tokens=12)
