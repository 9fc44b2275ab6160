"""Random ragged schedules against the reference: any prompts, limits, EOS ids, chunks and rows, call after call."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import LENGTHS, NEW_TOKENS, rechunked, target
from tests.exactness.models import Reference, prompt


@dataclass(frozen=True)
class Order:
    """One prompt of a schedule: its length, and how many tokens it may and must get."""

    length: int
    most: int
    least: int


ORDERS = st.builds(
    lambda length, limits: Order(length, max(limits), min(limits)),
    st.sampled_from(LENGTHS),
    st.tuples(st.integers(1, NEW_TOKENS), st.integers(0, NEW_TOKENS)),
)


@functools.cache
def _fast(rows: int, drafter: str) -> tuple[OptimizedModel, Reference]:
    compiled = target("llama", rows)
    return compiled.optimize(compiled.drafter(drafter)), compiled.reference


@functools.cache
def _engine(rows: int, drafter: str, chunk: int) -> Engine:
    """Kept for all examples: what a call leaves behind must not touch those after it."""
    fast = rechunked(_fast(rows, drafter)[0], chunk)
    fast._select({"min_new_tokens"}, hooked=False)
    return fast._engine


@functools.cache
def _likely_tokens() -> list[int]:
    reference = _fast(1, "rubbish")[1]
    return sorted({token for n in LENGTHS for token in reference(prompt(n), NEW_TOKENS)})


OFTEN = ((1, "sometimes-wrong"), (1, "rubbish"), (5, "sometimes-wrong"), (5, "draft-model"))
"""Tried each time; the others if --long."""


@pytest.mark.parametrize(
    ("rows", "drafter"),
    [
        pytest.param(rows, drafter, marks=() if (rows, drafter) in OFTEN else pytest.mark.long)
        for rows in (1, 2, 5)
        for drafter in ("sometimes-wrong", "rubbish", "draft-model")
    ],
)
@settings(max_examples=6)
@given(data=st.data())
def test_any_schedule_gives_the_tokens_of_the_reference(rows, drafter, data):
    _, reference = _fast(rows, drafter)
    engine = _engine(rows, drafter, data.draw(st.sampled_from([1, 24, 512]), label="prefill_chunk"))
    engine.lag = data.draw(st.integers(0, 1), label="lag")
    orders = data.draw(st.lists(ORDERS, min_size=1, max_size=2 * rows + 1), label="orders")
    eos = data.draw(st.lists(st.sampled_from(_likely_tokens()), max_size=6, unique=True), label="eos")

    requests = [
        Request(index, torch.tensor(prompt(order.length)), order.most, {"min_new_tokens": order.least})
        for index, order in enumerate(orders)
    ]
    for _ in engine.run(requests, eos):
        pass

    for request, order in zip(requests, orders, strict=True):
        assert request.output == reference(prompt(order.length), order.most, eos, order.least)
        assert request.finished


@pytest.mark.parametrize("lag", [0, 1])
@settings(max_examples=15)
@given(data=st.data())
def test_rows_that_the_caller_ends_make_room_and_change_no_other_row(lag, data):
    _, reference = _fast(2, "sometimes-wrong")
    engine = _engine(2, "sometimes-wrong", 24)
    engine.lag = lag
    lengths = data.draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=5), label="lengths")
    patience = [data.draw(st.integers(1, NEW_TOKENS), label="patience") for _ in lengths]

    requests = [Request(index, torch.tensor(prompt(n)), NEW_TOKENS) for index, n in enumerate(lengths)]
    for request in engine.run(requests):
        if len(request.output) >= patience[request.index]:
            request.finished = True

    for request, length, enough in zip(requests, lengths, patience, strict=True):
        expected = reference(prompt(length), NEW_TOKENS)
        assert len(request.output) >= enough
        assert request.output == expected[: len(request.output)]


def test_what_the_memory_held_before_does_not_matter():
    """NaN in every cache, other text in every history: only what a row wrote itself is read."""
    compiled = target("llama", 2)
    fast = compiled.optimize(compiled.drafter("draft-model"))
    tensors = fast._engine.tensors
    for name, value in tensors.items():
        if "_cache_" in name:
            value.fill_(torch.nan)
    tensors["history"].fill_(7)
    prompts = [prompt(n) for n in (33, 5, 17)]
    expected = [[*ids, *compiled.reference(ids, NEW_TOKENS)] for ids in prompts]
    assert fast.generate(prompts, max_new_tokens=NEW_TOKENS) == expected
