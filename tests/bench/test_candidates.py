import dataclasses
from typing import Any

import pytest

from bench import candidates, shapes
from bench.baselines import hf_generate
from bench.baselines.common import BaselineResult
from bench.candidates import CANDIDATES, Attempt, Task
from bench.figures import OURS, RATIOS, REFERENCE
from emssd_compile.drafters import DraftModel, PromptLookup

NUM_NEW = 6
PROMPTS = [[5, 6, 7, 5, 6], [9, 8, 7, 6, 9, 8, 7, 6, 9, 8]]


@pytest.fixture(scope="module")
def task() -> Task:
    model = shapes.build("tiny-llama")
    return Task(model, model, 2, 20, lookup_tokens=3, max_ngram=2, draft_tokens=2, backend="eager")


# Packed stands for all of ours, which take long to make. The static cache is in test_baselines.
@pytest.mark.parametrize("name", ["hf_generate", "hf_assisted", "vanilla_padded", "realign", "ours_packed"])
def test_a_candidate_decodes_as_many_tokens_as_asked_and_they_are_the_models_own(task, name):
    run = CANDIDATES[name](task)
    for num_new in (NUM_NEW, 1):
        alone = [hf_generate.run(task.model, [prompt], max_new_tokens=num_new).tokens[0] for prompt in PROMPTS]
        assert run(PROMPTS, max_new_tokens=num_new).tokens == alone


def test_layouts_differ_in_nothing_but_the_layout(task, monkeypatch):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        candidates, "compile_ours", lambda _, drafter, **options: asked.append({**options, "d": drafter})
    )
    for name in ("ours_packed", "ours_padded", "ours_auto", "ours_int8_kv"):
        CANDIDATES[name](task)
    assert [options.pop("layout") for options in asked] == ["packed", "padded", "auto", "auto"]
    assert [options.pop("kv_dtype") for options in asked] == [None, None, None, "int8"]
    for options in asked:
        drafter = options.pop("d")
        assert isinstance(drafter, PromptLookup)
        assert (drafter.num_draft_tokens, drafter.max_ngram) == (task.lookup_tokens, task.max_ngram)
    assert asked == [{"max_batch": 2, "max_length": 20, "backend": "eager"}] * 4


def test_ratios_are_of_candidates_that_there_are():
    named = {name for sides in RATIOS.values() for side in sides for name in side} | {REFERENCE, *OURS}
    assert named <= set(CANDIDATES)


def test_a_candidate_that_cannot_be_made_says_why():
    def make() -> candidates.Run:
        raise NotImplementedError("not on this machine\nlong explanation")

    attempt = Attempt(make)
    assert attempt.failure == "NotImplementedError: not on this machine"
    assert attempt(PROMPTS, max_new_tokens=1) is None


def test_a_candidate_that_fails_is_not_run_again():
    calls: list[int] = []

    def run(prompts: list[list[int]], *, max_new_tokens: int) -> BaselineResult:
        calls.append(max_new_tokens)
        if max_new_tokens > 1:
            raise MemoryError
        return BaselineResult([[1]], 1.0)

    attempt = Attempt(lambda: run)
    assert attempt(PROMPTS, max_new_tokens=1) is not None
    assert attempt(PROMPTS, max_new_tokens=2) is None
    assert attempt.failure == "batch 2: MemoryError: "
    assert attempt(PROMPTS, max_new_tokens=1) is None
    assert calls == [1, 2]


def test_the_draft_model_drafts_as_many_tokens_as_asked(task, monkeypatch):
    drafters: list[object] = []
    monkeypatch.setattr(candidates, "compile_ours", lambda _, drafter, **__: drafters.append(drafter))
    CANDIDATES["ours_draft_model"](task)
    (drafter,) = drafters
    assert isinstance(drafter, DraftModel)
    assert drafter.num_draft_tokens == task.draft_tokens


def test_without_a_draft_model_it_says_where_there_is_one(task):
    attempt = Attempt(lambda: CANDIDATES["ours_draft_model"](dataclasses.replace(task, draft_model=None)))
    assert attempt.failure is not None
    assert "--shape demo" in attempt.failure
