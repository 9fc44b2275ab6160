"""Stopping criteria see what transformers shows them, whenever tokens arrive; rows end where they should."""

import itertools
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.generation import GenerateOptions
from emssd_compile.runtime.consumer import Consumer
from emssd_compile.runtime.inputs import parse_prompts
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import target
from tests.exactness.models import prompt

PAD, NEW, ROWS = 0, 10, 2


class Counting:
    """Ends each row after so many of its own new tokens: keeps state for each row, and must be asked once a token."""

    def __init__(self, patience: list[int]) -> None:
        self.patience = patience
        self.seen: list[list[list[int]]] = []
        self.count = [0] * len(patience)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        self.seen.append(input_ids.tolist())
        self.count = [count + 1 for count in self.count]
        return torch.tensor([count >= most for count, most in zip(self.count, self.patience, strict=True)])


@given(data=st.data())
def test_criteria_are_asked_in_lockstep_whatever_order_the_tokens_come_in(data):
    rows = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), label="prompt lengths")
    texts = [list(range(10 * row + 10, 10 * row + 10 + data.draw(st.integers(1, 6)))) for row in range(len(rows))]
    patience = data.draw(st.lists(st.integers(1, 7), min_size=len(rows), max_size=len(rows)), label="patience")
    prompts = parse_prompts([[5] * n for n in rows], vocab_size=100, capacity=64)
    requests = [Request(i, prompts.given[i], 6) for i in range(len(rows))]
    criterion = Counting(patience)
    consumer = Consumer(prompts, requests, GenerateOptions(stopping_criteria=(criterion,), pad_token_id=PAD))
    while going := [r for r in requests if not r.finished]:
        request = data.draw(st.sampled_from(going))
        text, start = texts[request.index], len(request.output)
        request.output += text[start : start + data.draw(st.integers(1, 3))]
        request.finished = len(request.output) == len(text)
        consumer.take(request)

    kept = [text[:most] for text, most in zip(texts, patience, strict=True)]
    assert [request.output for request in requests] == kept
    width = max(rows)
    for n, seen in enumerate(criterion.seen, 1):  # as transformers: on the left padded, and behind what has ended
        for row, length, text in zip(seen, rows, kept, strict=True):
            new = (text + [PAD] * n)[:n]
            assert row == [PAD] * (width - length) + [5] * length + new
    assert len(criterion.seen) == max(map(len, kept))


def test_rows_that_ran_ahead_are_cut_back_and_make_room():
    """Also where the third prompt starts when another row has ended, so that criteria are asked late."""
    compiled = target("llama", ROWS)
    fast = compiled.optimize(compiled.drafter("sometimes-wrong"))
    reference = compiled.reference
    criterion = Counting([3, 7, 5])
    prompts = [prompt(n) for n in (17, 40, 5)]
    out = fast.generate(prompts, max_new_tokens=NEW, stopping_criteria=[criterion])
    assert out == [[*ids, *reference(ids, most)] for ids, most in zip(prompts, (3, 7, 5), strict=True)]
    assert not fast._engine.tensors["active"].any()


@pytest.mark.parametrize("side", ["left", "none"])
def test_stateful_criteria_do_what_they_do_to_transformers(side):
    """The same criterion sees the same calls, and the same tokens come out."""
    compiled = target("llama", ROWS)
    fast, model = compiled.optimize(compiled.drafter("sometimes-wrong")), cast("Any", compiled.model)
    lengths = (5, 17, 2) if side == "left" else (17, 17)
    width = max(lengths)
    ids = torch.tensor([[PAD] * (width - n) + prompt(n) for n in lengths])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    free = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, pad_token_id=PAD)
    eos = int(free[0, width + 5])
    patience = [NEW + 1, 3, 6][: len(lengths)]
    ours, theirs = Counting(patience), Counting(patience)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": PAD}
    expected = model.generate(ids, stopping_criteria=[theirs], **options)
    assert fast.generate(ids, stopping_criteria=[ours], **options).tolist() == expected.tolist()
    assert ours.seen == theirs.seen
    assert len(ours.seen) > 3


def test_a_bool_ends_all_rows():
    compiled = target("llama", ROWS)
    fast = compiled.optimize(compiled.drafter("always-right"))
    prompts = [prompt(n) for n in (17, 40)]
    out = fast.generate(prompts, max_new_tokens=NEW, stopping_criteria=[lambda ids, scores: ids.shape[1] == 40 + 4])
    assert out == [[*ids, *compiled.reference(ids, 4)] for ids in prompts]


def test_a_time_limit_ends_each_row_with_its_next_token(monkeypatch):
    prompts = parse_prompts([[5], [6, 7]], vocab_size=100, capacity=64)
    requests = [Request(i, prompts.given[i], 9) for i in range(2)]
    clock = itertools.count(100)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    consumer = Consumer(prompts, requests, GenerateOptions(max_time=2.5))
    for request, tokens, kept in (
        (requests[0], [11, 12], [11, 12]),
        (requests[1], [13], [13]),
        (requests[0], [14, 15], [11, 12, 14]),
        (requests[1], [16, 17], [13, 16]),
    ):
        request.output += tokens
        consumer.take(request)
        assert request.output == kept
    assert all(request.finished for request in requests)


def test_no_time_limit_is_set_by_infinity():
    compiled = target("llama", ROWS)
    fast = compiled.optimize(compiled.drafter("none"))
    expected = [[*prompt(5), *compiled.reference(prompt(5), NEW)]]
    assert fast.generate([prompt(5)], max_new_tokens=NEW, max_time=float("inf")) == expected
