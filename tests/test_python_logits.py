"""transformers' logits processors and `prefix_allowed_tokens_fn`, under speculation: what they give without drafts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

import emssd_compile
from emssd_compile.errors import OptionError, ProcessorError
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.step.randomness import gumbels
from tests.export.subjects import VOCABULARY, Small, drafter, prompt

NEW = 20
PROMPTS = [prompt(n) for n in (1, 9, 4, 30)]
SEEDS = [1, 2, 3, 4]


@functools.cache
def _fast(name: str) -> OptimizedModel:
    return emssd_compile.optimize(
        Small(), drafter(name), max_batch=3, max_length=64, backend="eager", layout="packed", prefill_chunk=27
    )


@torch.no_grad()
def _plainly(process: Callable[[int, Tensor, Tensor], Tensor], seeds: Sequence[int] | None = None) -> list[list[int]]:
    """One prompt and one token at a time."""
    model, texts = Small(), [list(ids) for ids in PROMPTS]
    for row, text in enumerate(texts):
        for _ in range(NEW):
            ids = torch.tensor([text])
            scores = process(row, ids, model(ids)[:, -1])[0]
            if seeds is not None:
                scores = scores + gumbels(torch.tensor(seeds[row]), torch.tensor(len(text)), torch.arange(VOCABULARY))
            text.append(int(scores.argmax()))
    return texts


def _even_behind_odd(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A user's own: what follows an odd id is even, whatever the row."""
    ids = torch.arange(scores.shape[1])
    return scores.masked_fill((input_ids[:, -1:] % 2 == 1) & (ids % 2 == 1), -torch.inf)


def _allowed(batch_id: int, text: Tensor) -> list[int]:
    """Depends on which prompt it is, and on all of the text."""
    return [token for token in range(VOCABULARY) if (token + batch_id + int(text.sum())) % 3]


PROCESSORS = LogitsProcessorList(
    [RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(2), _even_behind_odd]
)


@pytest.mark.parametrize("name", ["lookup", "draft-model", "forks"])
def test_tokens_are_those_of_the_processors_without_drafts(name):
    expected = _plainly(lambda row, ids, scores: PROCESSORS(ids, scores))
    assert _fast(name).generate(PROMPTS, max_new_tokens=NEW, logits_processor=PROCESSORS) == expected


@pytest.mark.parametrize("name", ["draft-model", "forks"])
def test_what_may_follow_is_asked_for_with_the_prompts_number_and_its_own_text(name):
    def process(row: int, ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, -torch.inf)
        mask[:, _allowed(row, ids[0])] = 0
        return _even_behind_odd(ids, scores + mask)

    found = _fast(name).generate(
        PROMPTS, max_new_tokens=NEW, prefix_allowed_tokens_fn=_allowed, logits_processor=[_even_behind_odd]
    )
    assert found == _plainly(process)


def test_rows_that_sample_draw_from_what_the_processors_leave():
    expected = _plainly(lambda row, ids, scores: PROCESSORS(ids, scores), SEEDS)
    found = _fast("draft-model").generate(
        PROMPTS, max_new_tokens=NEW, logits_processor=PROCESSORS, do_sample=True, seed=SEEDS, top_k=0
    )
    assert found == expected


def test_only_texts_of_requests_are_seen():
    """No warm-up, no padding: each text begins with a prompt, and its last token is a known one or a draft."""
    seen: list[list[int]] = []

    def watch(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.extend(input_ids.tolist())
        return scores

    fast = emssd_compile.optimize(Small(), max_batch=3, max_length=64, backend="eager")
    fast.generate(PROMPTS, max_new_tokens=NEW, logits_processor=[watch])
    assert all(any(text[: len(ids)] == ids for ids in PROMPTS) for text in seen)


class _OfEachCall:
    """Keeps something for each row of the batch, as if each call had one more token of each."""

    def __init__(self, error: type[Exception] | None = None) -> None:
        self.calls, self.error = 0, error

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls == 2:
            raise self.error
        return scores + self.calls * (torch.arange(scores.shape[1]) == 3)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no list": ({"logits_processor": 3}, OptionError, "logits_processor is not a list of callables"),
    "no function": ({"prefix_allowed_tokens_fn": [1]}, OptionError, "prefix_allowed_tokens_fn=.* cannot be called"),
    "two ways": (
        {"logits_processor": [_even_behind_odd], "logits_hook": lambda c: c.logits},
        OptionError,
        "logits_hook, and logits_processor",
    ),
    "another shape": ({"logits_processor": [lambda i, s: s[:, 1:]]}, ProcessorError, r"returned a tensor of shape"),
    "nothing": ({"logits_processor": [lambda i, s: None]}, ProcessorError, "function returned NoneType"),
    "NaN": ({"logits_processor": [lambda i, s: s * torch.nan]}, ProcessorError, "returned NaN"),
    "other ones": ({"logits_processor": [_OfEachCall()]}, ProcessorError, "_OfEachCall, called twice .* differs"),
    "an error": (
        {"logits_processor": [_even_behind_odd, _OfEachCall(AssertionError)]},
        ProcessorError,
        r"_OfEachCall, called twice .* raised AssertionError\(\)",
    ),
    "nothing allowed": (
        {"prefix_allowed_tokens_fn": lambda b, t: []},
        ProcessorError,
        "allows nothing behind the 1 tokens of row 0",
    ),
}


def test_a_processor_is_asked_twice_when_it_is_first_asked():
    """A prompt of several chunks is read in steps that ask nobody."""
    with pytest.raises(ProcessorError, match=r"_OfEachCall, called twice .* differs"):
        _fast("none").generate([[*range(1, 30), *range(1, 11)]], max_new_tokens=4, logits_processor=[_OfEachCall()])


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused_and_the_object_goes_on(case):
    options, error, message = BAD[case]
    fast = _fast("lookup")
    expected = fast.generate(PROMPTS, max_new_tokens=NEW)
    with pytest.raises(error, match=message):
        fast.generate(PROMPTS, max_new_tokens=NEW, **options)
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
