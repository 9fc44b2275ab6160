"""Where few of the rows are decoded, a drafter works for those: its drafts are what they are when it works for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import emssd_compile
from emssd_compile.drafters import Drafter, DraftModel, PromptLookup
from emssd_compile.errors import DrafterError
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime import memory
from emssd_compile.stats import Stats
from emssd_compile.step.signature import DRAFT_ROWS
from tests.exactness.compiled import CAPACITY, target
from tests.exactness.models import build
from tests.exactness.trained_heads import (
    CASES,
    FAMILIES,
    NEW,
    OTHERS,
    PROMPTS,
    ROWS,
    SAMPLING,
    SIZES,
    expected_texts,
    in_turn,
    make_drafter,
)
from tests.export.subjects import Small
from tests.export.subjects import prompt as small_prompt

FAMILY = FAMILIES[0]
NARROW = tuple(case for case in (*CASES, *OTHERS) if case != "early-exit")
"""What can draft for few rows: not what writes to the target's caches, which have all."""
OFTEN = ("suffix-or-head",)
PAGED = ("eagle3-tree",)
"""Tried each time: a lookup; trees of a head with a cache of its own. The others if --long."""


def _drafter(case: str) -> Drafter:
    return DraftModel(build("gpt2"), 3) if case == "draft-model" else make_drafter(FAMILY, case)


def _fast(drafter: Drafter, backend: str = "eager", **options: Any) -> OptimizedModel:
    return emssd_compile.optimize(target(FAMILY, ROWS).model, drafter, backend=backend, **SIZES, **options)


def _decoded(fast: OptimizedModel) -> Iterator[tuple[int, Stats]]:
    """With one row in use, two, all of them, and all of them until the last ones are through: what was counted."""
    for count in (1, 2, ROWS, ROWS + 1):
        fast.stats.reset()
        assert fast.generate(PROMPTS[:count], max_new_tokens=NEW) == expected_texts(FAMILY)[:count]
        yield count, fast.stats


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in OFTEN else pytest.mark.long) for case in (*NARROW, "draft-model")],
)
def test_drafts_do_not_depend_on_how_many_rows_there_are(case):
    few, every = _fast(_drafter(case)), _drafter(case)
    every.any_rows = False
    all_rows = _fast(every)
    assert DRAFT_ROWS in few._engine.variant.input_names
    assert DRAFT_ROWS not in all_rows._engine.variant.input_names
    for (count, one), (_, other) in zip(_decoded(few), _decoded(all_rows), strict=True):
        assert one == other, f"{count} prompts"
    assert few.generate(PROMPTS, **SAMPLING) == all_rows.generate(PROMPTS, **SAMPLING)


@pytest.mark.long
@pytest.mark.parametrize("cases", [("recurrent",), NARROW], ids=["recurrent", "all"])
def test_compiled_once_for_any_number_of_rows(cases):
    """Where drafts are lost in some rows, only counts show it: tokens are right whatever is drafted."""
    every = in_turn(FAMILY, cases)
    every.any_rows = False
    compiled, eager = _fast(in_turn(FAMILY, cases), "inductor"), _fast(every)
    for (count, one), (_, other) in zip(_decoded(compiled), _decoded(eager), strict=True):
        assert one == other, f"{count} prompts"
        assert one.num_draft_tokens > 0


def test_a_draft_models_tree_is_compiled_for_any_number_of_rows():
    """Drafts behind three nodes of each row become drafts of the row: a view that splits rows and merges drafts."""
    given: dict[str, Any] = {"max_batch": 3, "max_length": 64, "layout": "packed"}
    every = DraftModel(Small(1), tree=(3, 2, 1))
    every.any_rows = False
    compiled = emssd_compile.optimize(Small(), DraftModel(Small(1), tree=(3, 2, 1)), **given)
    eager = emssd_compile.optimize(Small(), every, backend="eager", **given)
    for count in (1, 2, 3):
        prompts = [small_prompt(n) for n in (5, 1, 30)[:count]]
        for fast in (compiled, eager):
            fast.stats.reset()
        assert compiled.generate(prompts, max_new_tokens=NEW) == eager.generate(prompts, max_new_tokens=NEW)
        assert compiled.stats == eager.stats


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in PAGED else pytest.mark.long) for case in (*NARROW, "draft-model")],
)
def test_caches_of_their_own_are_blocks_for_few_rows_too(case, monkeypatch):
    """What a drafter keeps is found by the table of the rows in use; several sequences of a prompt share its blocks."""
    monkeypatch.setattr(memory, "BLOCK_SIZE", 8)
    slabs, pages = _fast(_drafter(case)), _fast(_drafter(case), memory="paged", kv_tokens=2 * CAPACITY)
    assert DRAFT_ROWS in pages._engine.variant.input_names
    assert not pages._engine.variant.signature.with_role("cache"), pages.explain().memory
    for (count, one), (_, other) in zip(_decoded(pages), _decoded(slabs), strict=True):
        assert replace(one, prefix_cache_queries=0) == other, f"{count} prompts"  # slabs have nothing to ask
    for count in (1, ROWS):
        several: dict[str, Any] = {"num_return_sequences": count, **SAMPLING}
        assert pages.generate(PROMPTS[2:], **several) == slabs.generate(PROMPTS[2:], **several)


def test_the_step_is_given_the_rows_in_use_and_no_more():
    fast = _fast(make_drafter(FAMILY, "eagle3"))
    fast.warmup()
    variant = fast._engine.variant
    places = {name: place for place, name in enumerate(variant.input_names)}
    caches = [places[name] for name in variant.of_first_rows]
    assert caches
    step, seen = variant.step, list[int]()

    def watched(*given):
        rows = len(given[places[DRAFT_ROWS]])
        assert all(len(given[place]) == rows for place in caches)
        seen.append(rows)
        return step(*given)

    object.__setattr__(variant, "step", watched)
    for count in (1, ROWS):
        seen.clear()
        fast.generate(PROMPTS[:count], max_new_tokens=NEW)
        assert max(seen) == count


def test_a_drafter_has_to_say_that_it_can():
    class TakesTheRowsForANumber(PromptLookup):
        def forward(self, context):
            for _ in range(len(context.known)):
                pass
            return super().forward(context)

    with pytest.raises(DrafterError, match=r"a size of draft_rows differs from step to step.*`any_rows`"):
        _fast(TakesTheRowsForANumber())
    careful = TakesTheRowsForANumber()
    careful.any_rows = False
    assert _fast(careful).generate(PROMPTS, max_new_tokens=NEW) == expected_texts(FAMILY)


def test_a_drafter_that_writes_to_the_targets_caches_has_all_rows():
    drafter = make_drafter(FAMILY, "early-exit")
    drafter.any_rows = True
    with pytest.raises(DrafterError, match="set any_rows to False"):
        _fast(drafter)
