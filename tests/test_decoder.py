"""Two callers of one object, what a call leaves behind, and what types come back."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, assert_type, get_overloads

import numpy as np
import pytest
import torch
from torch import Tensor

from emssd_compile.decoder import Decoder
from emssd_compile.errors import OptionError, ReentryError
from emssd_compile.runtime.containers import Array
from emssd_compile.runtime.outputs import GenerateOutput
from tests.exactness.compiled import target
from tests.exactness.models import prompt

NEW = 10


@pytest.fixture(scope="module")
def fast():
    compiled = target("llama")
    return compiled.optimize(compiled.drafter("sometimes-wrong"))


def _expected(*lengths: int) -> list[list[int]]:
    return [[*prompt(n), *target("llama").reference(prompt(n), NEW)] for n in lengths]


def _prompts(*lengths: int) -> list[list[int]]:
    return [prompt(n) for n in lengths]


def test_threads_take_turns(fast):
    """Each gets its own tokens, though all begin while another one decodes."""
    batches = [(5, 33), (17,), (40, 2, 7), (64,), (3, 23), (11, 19)]
    begin = threading.Barrier(len(batches))

    def decode(lengths: tuple[int, ...]) -> list[list[int]]:
        begin.wait()
        return fast.generate(_prompts(*lengths), max_new_tokens=NEW)

    with ThreadPoolExecutor(len(batches)) as pool:
        assert list(pool.map(decode, batches)) == [_expected(*lengths) for lengths in batches]


def test_a_thread_that_comes_in_the_middle_waits(fast):
    """The first call holds its turn until the second thread has begun; no step of the second runs before it is over."""
    order: list[str] = []
    begun = threading.Event()

    def second() -> list[list[int]]:
        begun.set()
        rows = fast.generate(_prompts(17), max_new_tokens=NEW)
        order.append("second")
        return rows

    def wait(ids: Tensor, scores: None) -> bool:
        if not order:
            order.append("first")
            waiting.append(pool.submit(second))
            assert begun.wait(60)
        return False

    waiting: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        first = fast.generate(_prompts(5, 33), max_new_tokens=NEW, stopping_criteria=[wait])
        assert not waiting[0].done() or order == ["first", "second"]
        assert waiting[0].result(60) == _expected(17)
    assert first == _expected(5, 33)


class _Streamer:
    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._puts = 0

    def put(self, value: Tensor) -> None:
        self._puts += 1
        if self._puts == 3:  # the prompt is the first
            self._call()

    def end(self) -> None:
        pass


def _within(fast: Decoder, place: str, call: Callable[[], object]) -> None:
    """Make a call from inside `generate`."""
    if place == "criterion":
        fast.generate(_prompts(5), max_new_tokens=NEW, stopping_criteria=[lambda ids, scores: bool(call())])
    else:
        fast.generate(_prompts(5), max_new_tokens=NEW, streamer=_Streamer(call))


@pytest.mark.parametrize("place", ["criterion", "streamer"])
@pytest.mark.parametrize("called", ["generate", "warmup", "in a context's copy"])
def test_a_call_from_inside_another_is_refused_and_the_object_goes_on_working(fast, place, called):
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: fast.generate(_prompts(17), max_new_tokens=NEW),
        "warmup": fast.warmup,
        "in a context's copy": lambda: asyncio.run(asyncio.to_thread(fast.generate, _prompts(17), max_new_tokens=NEW)),
    }
    name = "warmup" if called == "warmup" else "generate"
    with pytest.raises(ReentryError, match=f"{name} was called from inside a call of the same object.*second object"):
        _within(fast, place, calls[called])
    assert fast.generate(_prompts(17, 5), max_new_tokens=NEW) == _expected(17, 5)


def test_another_object_may_decode_inside_a_call(fast):
    compiled = target("llama")
    other = compiled.optimize(compiled.drafter("none"))
    rows: list[object] = []

    def criterion(ids: Tensor, scores: None) -> bool:
        rows.append(other.generate(_prompts(17), max_new_tokens=NEW))
        return False

    assert fast.generate(_prompts(5), max_new_tokens=NEW, stopping_criteria=[criterion]) == _expected(5)
    assert rows == [_expected(17)] * NEW


def test_what_a_call_counted_that_was_broken_off_is_not_in_the_next_one(fast):
    def broken(ids: Tensor, scores: None) -> bool:
        if ids.shape[1] > 35:
            raise KeyboardInterrupt
        return False

    fast.stats.reset()
    with pytest.raises(KeyboardInterrupt):
        fast.generate(_prompts(33, 5), max_new_tokens=NEW, stopping_criteria=[broken])
    assert fast.stats.num_emitted_tokens > 0, "it did decode"
    fast.stats.reset()
    fast.generate(_prompts(17), max_new_tokens=NEW)
    assert fast.stats.num_emitted_tokens == NEW


def test_a_criterion_that_answers_nothing_is_named_at_its_first_call(fast):
    calls: list[int] = []

    def forgetful(ids: Tensor, scores: None) -> None:
        calls.append(ids.shape[1])

    with pytest.raises(OptionError, match=r"forgetful answered None; it must return True, False"):
        fast.generate(_prompts(5, 17), max_new_tokens=NEW, stopping_criteria=[forgetful])
    assert calls == [18]
    assert fast.generate(_prompts(17, 5), max_new_tokens=NEW) == _expected(17, 5)


def test_stats_are_reset_and_read_while_another_thread_decodes(fast):
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            assert fast.stats.mean_acceptance_length >= 1
            fast.stats.reset()

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        for _ in range(3):
            assert fast.generate(_prompts(5, 33), max_new_tokens=NEW) == _expected(5, 33)
        stop.set()
        watching.result()
    fast.stats.reset()
    assert fast.stats.num_emitted_tokens == 0


def test_arrays_of_numpy_come_back_as_arrays(fast):
    rows = np.array([[0, 0, 0, *prompt(5)], prompt(8)], dtype=np.int32)
    out = fast.generate(rows, attention_mask=rows != 0, max_new_tokens=NEW, pad_token_id=0)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.int64
    new = [target("llama").reference(prompt(n), NEW) for n in (5, 8)]
    assert out.tolist() == np.concatenate([rows, np.array(new)], 1).tolist()
    ragged = fast.generate([np.array(prompt(n), dtype=np.uint16) for n in (5, 33)], max_new_tokens=NEW)
    assert all(isinstance(row, np.ndarray) for row in ragged)
    assert [row.tolist() for row in ragged] == _expected(5, 33)
    mapped = fast.generate({"input_ids": rows, "attention_mask": (rows != 0).astype(float)}, max_new_tokens=NEW)
    assert mapped.tolist() == out.tolist()


def test_what_comes_back_is_typed_by_what_went_in(fast: Decoder):
    """The checks are mypy's, which lint runs over this file."""
    ids, array = torch.tensor([prompt(5)]), np.array([prompt(5)])
    rows: Sequence[tuple[int, ...]] = [tuple(prompt(5))]
    assert_type(fast.generate(ids, max_new_tokens=1), Tensor)
    assert_type(fast.generate([prompt(5)], max_new_tokens=1), list[list[int]])
    assert_type(fast.generate(rows, max_new_tokens=1), list[list[int]])
    assert_type(fast.generate([ids[0]], max_new_tokens=1), list[Tensor])
    assert_type(fast.generate((ids[0],), max_new_tokens=1), list[Tensor])
    assert isinstance(assert_type(fast.generate(array, max_new_tokens=1), Array), np.ndarray)
    arrays: list[Array] = [array[0]]
    assert_type(fast.generate(arrays, max_new_tokens=1), list[Array])
    assert_type(fast.generate(input_ids=ids, max_new_tokens=1), Tensor)
    output = fast.generate(ids, max_new_tokens=1, return_dict_in_generate=True)
    assert_type(output, GenerateOutput[Tensor])
    assert_type(output.sequences, Tensor)
    assert_type(fast.generate({"input_ids": ids}, max_new_tokens=1), Any)
    assert get_overloads(Decoder.generate)


def test_what_a_streamer_does_to_the_prompt_is_its_own_business(fast):
    ids = torch.tensor([prompt(5)])
    given = ids.clone()
    rows = fast.generate(ids, max_new_tokens=NEW, streamer=_Clearing())
    assert torch.equal(ids, given)
    assert rows.tolist() == _expected(5)


class _Clearing:
    def put(self, value: Tensor) -> None:
        value.zero_()

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    "options",
    [{}, {"max_length": 30, "max_new_tokens": 3}, {"max_new_tokens": 3, "min_new_tokens": 5, "eos_token_id": 1}],
)
def test_a_warning_points_at_the_call(fast, options):
    with pytest.warns(UserWarning, match="no length was asked for|gives way to|more than the maximum") as warned:
        fast.generate(_prompts(5), **options)
    assert {warning.filename for warning in warned} == {__file__}
