"""Parts of a user's own, used through the public interface: options by row, state, and exact tokens all the same."""

import functools
from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile import OptimizedModel
from emssd_compile.drafters import DraftModel, PromptLookup
from emssd_compile.layouts import LAYOUTS
from emssd_compile.logits import FILTERS, PROCESSORS
from tests.exactness.compiled import CAPACITY, K, target
from tests.exactness.models import prompt
from tests.exactness.parts import AlternatingLayout, Ban, Impatient, Margin, Timid, ban, banned
from tests.passes.graphs import model_with_attention

ROWS, NEW = 3, 12
PROMPTS = [prompt(n) for n in (5, 40, 17, 1, 64)]
DRAFTERS = ("none", "sometimes-wrong", "fixed-tree", "random-tree", "draft-model")
OFTEN = ("draft-model",)


@functools.cache
def _expected(is_banned: bool) -> list[list[int]]:
    model = target("llama", ROWS).model
    if is_banned:
        return [banned(model, ids, NEW) for ids in PROMPTS]
    return [[*ids, *target("llama", ROWS).reference(ids, NEW)] for ids in PROMPTS]


def _mixed(which: list[bool]) -> list[list[int]]:
    return [_expected(each)[row] for row, each in enumerate(which)]


def _optimize(drafter: str, layout: str, backend: str = "eager") -> OptimizedModel:
    model = target("llama", ROWS).model
    inner = DraftModel(model, K) if drafter == "draft-model" else target("llama", ROWS).drafter(drafter)
    return emssd_compile.optimize(
        model,
        Timid(inner),
        acceptance=Impatient(),
        processors=[Ban()],
        probes=[Margin()],
        layout=layout,
        backend=backend,
        max_batch=ROWS,
        max_length=CAPACITY,
        prefill_chunk=48,
    )


@pytest.fixture(autouse=True)
def _layout(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "alternating", AlternatingLayout())


def _fill_caches_with_nan(fast: OptimizedModel) -> None:
    caches = [t for name, t in fast._engine.tensors.items() if "_cache_" in name]
    assert caches
    for cache in caches:
        cache.fill_(torch.nan)


def _check_margins(told: Any) -> None:
    """Of rows that nothing is banned in, against the model's own logits."""
    model = target("llama", ROWS).model
    for row in (1, 3):
        with torch.no_grad():
            logits = model(torch.tensor([told.sequences[row]])).logits[0, len(PROMPTS[row]) - 1 : -1]
        top = logits.topk(2, -1).values
        torch.testing.assert_close(told.margin[row], top[:, 0] - top[:, 1], rtol=1e-4, atol=1e-5)
        steps = told.step[row][:, 0]
        assert len(steps) == NEW
        assert (steps.diff() >= 0).all(), "each token is told of in the step that it came in"


CASES = [
    *((drafter, "alternating", place % 2) for place, drafter in enumerate(DRAFTERS) if drafter in OFTEN),
    *(
        pytest.param(drafter, "alternating", place % 2, marks=pytest.mark.long)
        for place, drafter in enumerate(DRAFTERS)
        if drafter not in OFTEN
    ),
    pytest.param("random-tree", "auto", 0, marks=pytest.mark.long),
    ("random-tree", "auto", 1),
    ("sometimes-wrong", "padded", 1),
]


@pytest.mark.parametrize(("drafter", "layout", "lag"), CASES)
def test_one_part_of_each_kind_and_the_tokens_are_those_of_each_prompt_alone(drafter, layout, lag):
    fast = _optimize(drafter, layout)
    fast._engine.lag = lag
    _fill_caches_with_nan(fast)
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == _expected(False)
    assert fast.generate(PROMPTS, max_new_tokens=NEW, ban=True) == _expected(True)
    which = [True, False, True, False, True]
    options: dict[str, Any] = {"ban": which, "most_drafts": [3, 100, 0, 1, 4], "most_accepted": [1, 0, 100, 2, 3]}
    if layout == "alternating":
        options["in_between"] = [0, 2.5, 1, 0.0, 4]
    assert fast.generate(PROMPTS, max_new_tokens=NEW, **options) == _mixed(which)
    told = fast.generate(PROMPTS, max_new_tokens=NEW, margin=True, return_dict_in_generate=True, **options)
    assert told.sequences == _mixed(which)
    _check_margins(told)
    hooked = fast.generate(PROMPTS, max_new_tokens=NEW, logits_hook=ban, most_drafts=[0, 1, 2, 3, 4])
    assert hooked == _expected(True), "in Python between two halves it does what it does compiled in"
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == _expected(False), "and leaves nothing behind"


def test_options_reach_their_parts():
    fast = _optimize("sometimes-wrong", "packed")
    cases: tuple[tuple[dict[str, Any], bool, bool], ...] = (
        ({}, True, True),
        ({"most_drafts": 0}, False, False),
        ({"most_accepted": 0}, True, False),
    )
    for options, expect_drafts, expect_accepted in cases:
        fast.stats.reset()
        assert fast.generate(PROMPTS, max_new_tokens=NEW, **options) == _expected(False)
        assert (fast.stats.num_draft_tokens > 0) is expect_drafts
        assert (fast.stats.num_accepted_draft_tokens > 0) is expect_accepted


def test_an_option_of_one_row_is_not_that_of_the_row_that_comes_after():
    """More prompts than rows: what a request does not set is back at its default where another set it."""
    fast = _optimize("sometimes-wrong", "packed")
    which = [True, True, True, False, False]
    assert fast.generate(PROMPTS, max_new_tokens=NEW, ban=which) == _mixed(which)
    assert fast.generate(PROMPTS[:1], max_new_tokens=NEW, most_drafts=0) == _expected(False)[:1]
    fast.stats.reset()
    fast.generate(PROMPTS[:1], max_new_tokens=NEW)
    assert fast.stats.num_draft_tokens > 0


def test_state_of_each_part_lasts_as_it_was_declared():
    fast = _optimize("sometimes-wrong", "alternating")
    fast.warmup()
    fast.stats.reset()
    fast.generate(PROMPTS[:1], max_new_tokens=NEW, ban=True)
    tensors, stats = fast._engine.tensors, fast.stats
    assert int(tensors["rule_accepted"][0]) >= stats.num_accepted_draft_tokens > 0
    assert int(tensors["drafter_own__steps"][0]) == stats.num_row_steps
    (steps,) = [t for name, t in tensors.items() if name.startswith("processor_")]
    before = int(steps), int(tensors["policy_steps"])
    fast.stats.reset()
    fast.generate(PROMPTS[:1], max_new_tokens=NEW, ban=True)
    assert int(tensors["drafter_own__steps"][0]) == stats.num_row_steps, "zeroed where a request starts"
    (steps,) = [t for name, t in fast._engine.tensors.items() if name.startswith("processor_")]
    assert (int(steps), int(fast._engine.tensors["policy_steps"])) == tuple(n + stats.num_steps for n in before)


def test_min_new_tokens_and_another_processor_in_one_step():
    """Forms with one of them or both: each keeps its own state, whichever others are compiled in."""
    fast = _optimize("random-tree", "packed")
    eos = [row[len(ids) + 1] for row, ids in zip(_expected(True), PROMPTS, strict=True)]
    for least in (0, 6):
        found = fast.generate(PROMPTS, max_new_tokens=NEW, ban=True, eos_token_id=eos, min_new_tokens=least)
        for row, ids in zip(found, PROMPTS, strict=True):
            new = row[len(ids) :]
            assert len(new) > least or least == 0
            assert not set(new[:least]) & set(eos)
            assert all(token not in row[max(i - 3, 0) : i] for i, token in enumerate(row) if i >= len(ids))
    counts = {name: int(t) for name, t in fast._engine.tensors.items() if name.endswith("_steps") and t.dim() == 0}
    assert list(counts) == [f"processor_{len(PROCESSORS) - len(FILTERS)}_steps"]  # filters come behind


def test_both_ways_give_the_same_tokens_behind_inductor():
    model = model_with_attention()
    fast = emssd_compile.optimize(
        model, PromptLookup(3), processors=[Ban()], max_batch=2, max_length=40, layout="packed"
    )
    prompts = [[3, 1, 4, 1, 4, 1], [9], [2, 6, 5, 3, 5, 8]]
    expected = [banned(model, ids, NEW) for ids in prompts]
    assert fast.generate(prompts, max_new_tokens=NEW, ban=True) == expected
    assert fast.generate(prompts, max_new_tokens=NEW, logits_hook=ban) == expected
    strided = fast.generate(prompts, max_new_tokens=NEW, logits_hook=lambda c: ban(c).T.contiguous().T)
    assert strided == expected, "compiled code reads logits as contiguous memory, whatever a hook returns"
