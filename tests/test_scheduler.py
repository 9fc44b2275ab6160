"""`scheduler`: calls of several prompts each, in one set of rows; `generate` has one of them, a session many of one."""

import contextlib
import gc
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from emssd_compile import progress
from emssd_compile.calls import read_call
from emssd_compile.errors import GrammarError, SessionError
from emssd_compile.grammar import matching
from emssd_compile.jobs import Job, Jobs
from emssd_compile.scheduler import Scheduler
from tests.export.subjects import VOCABULARY, prompt
from tests.sessions import ROWS, SAMPLED, WAIT, fast, optimized, twin

EOS = VOCABULARY - 1


class _Mine(Exception):
    pass


def _job(lengths: list[int], seed: int = 0, **options: Any) -> Job:
    prompts, options = [*map(prompt, lengths)], {"max_new_tokens": 6, **options}
    return Job(read_call(fast()._terms, prompts, None, options, seed=seed))


def _decode(*given: Job) -> None:
    jobs = Jobs[Job]()
    for job in given:
        jobs.put(job)
    while jobs.counts()[1]:
        Scheduler(fast(), jobs).decode()
    assert jobs.counts() == (0, 0)
    assert not any(fast()._engine.requests), "no row is busy"


def _result(job: Job) -> Any:
    return job.call.result(fast().readings)


def test_calls_of_several_prompts_get_what_generate_gives_each_of_them():
    (text,) = twin().generate([prompt(9)], max_new_tokens=8)
    orders: list[tuple[list[int], dict[str, Any]]] = [
        ([5, 9, 14], {"max_new_tokens": 7}),
        ([11, 3], {"max_new_tokens": 5, "num_return_sequences": 3, "seed": 4, **SAMPLED}),
        ([9, 9], {"max_new_tokens": 8, "eos_token_id": [[text[-2]], [text[-5], text[-3]]]}),
        ([9], {"max_new_tokens": 8, "min_new_tokens": 6, "eos_token_id": text[-4]}),  # runs alone: it looks at its EOS
    ]
    jobs = [_job(lengths, **options) for lengths, options in orders]
    assert sum(len(job.call.requests) for job in jobs) > ROWS
    _decode(*jobs)
    for job, (lengths, options) in zip(jobs, orders, strict=True):
        assert job.error is None
        assert _result(job) == twin().generate([*map(prompt, lengths)], **options)


def test_prompts_of_two_calls_are_never_taken_for_one():
    jobs, several = Jobs[Job](), [_job([4, 4]), _job([6], num_return_sequences=2, **SAMPLED), _job([4])]
    for job in several:
        jobs.put(job)
    groups = [[request.group for request in job.call.requests] for job in several]
    assert groups == [[0, 1], [2, 2], [3]]


def test_what_a_criterion_raises_ends_its_call_and_no_other():
    error, widths = RuntimeError("mine"), []

    def fails(ids: Tensor, scores: None) -> Tensor:
        widths.append(ids.shape[1])
        if len(widths) == 3:
            raise error
        return ids[:, 0] < 0  # no row

    before, failing, behind = (
        _job([8, 8], max_new_tokens=9),
        _job([5, 7, 9], max_new_tokens=9, stopping_criteria=[fails]),
        _job([6, 12], max_new_tokens=4),
    )
    _decode(before, failing, behind)
    assert failing.error is error
    assert (before.error, behind.error) == (None, None)
    assert _result(before) == twin().generate([prompt(8)] * 2, max_new_tokens=9)
    assert _result(behind) == twin().generate([*map(prompt, [6, 12])], max_new_tokens=4)


@pytest.mark.parametrize("place", ["criterion", "end of the streamer"])
def test_what_generate_raises_is_gone_when_nobody_holds_it(place):
    """What an exception of a user's code holds, such as tensors of its frames, waits for no garbage collection."""
    raised: list[weakref.ref[BaseException]] = []

    def fails(*given: Any) -> bool:
        error = _Mine()
        raised.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    streamer = SimpleNamespace(put=lambda value: None, end=fails)
    given = {"stopping_criteria": [fails]} if place == "criterion" else {"streamer": streamer}
    gc.disable()
    try:
        with contextlib.suppress(_Mine):
            fast().generate([prompt(5)], max_new_tokens=3, **given)
        assert [error() for error in raised] == [None]
    finally:
        gc.enable()


def test_a_call_that_no_step_suits_ends_before_it_runs_and_the_others_go_on(monkeypatch):
    error, select = RuntimeError("no compiler"), fast()._select

    def picky(used: Any, *, hooked: bool) -> None:
        if "repetition_penalty" in used:
            raise error
        select(used, hooked=hooked)

    monkeypatch.setattr(fast(), "_select", picky)
    first, second, third = _job([5], repetition_penalty=1.3), _job([6, 7]), _job([8], repetition_penalty=1.3)
    _decode(first, second, third)
    assert [job.error for job in (first, second, third)] == [error, None, error]
    assert not first.call.requests[0].output
    assert _result(second) == twin().generate([*map(prompt, [6, 7])], max_new_tokens=6)


class _Streamer:
    """Notes what it gets, and how many steps were counted when that ended."""

    def __init__(self) -> None:
        self.tokens, self.num_ends, self.num_steps = list[int](), 0, 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.num_ends, self.num_steps = self.num_ends + 1, fast().stats.num_steps


class _Lying:
    """A matcher that allows every token, and takes fewer."""

    def __init__(self, takes: int) -> None:
        self._left = takes

    def accept_token(self, token: int) -> bool:
        self._left -= 1
        return self._left >= 0

    def rollback(self, count: int) -> None:
        self._left += count

    def fill_next_token_bitmask(self, bitmask: Tensor, index: int) -> None:
        bitmask[index] = -1


def test_a_streamer_is_told_the_end_once_all_is_counted_even_if_the_last_token_breaks_the_grammar():
    (text,) = twin().generate([prompt(5)], max_new_tokens=4)
    for takes, wrong in ((4, None), (3, GrammarError)):
        fast().stats.reset()
        streamer = _Streamer()
        grammar = matching(partial(_Lying, takes), VOCABULARY, [EOS])
        options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": EOS, "grammar": grammar, "streamer": streamer}
        with contextlib.nullcontext() if wrong is None else pytest.raises(wrong):
            fast().generate([prompt(5)], **options)
        assert (streamer.tokens, streamer.num_ends) == (text, 1)
        assert streamer.num_steps == fast().stats.num_steps > 0


def test_a_call_of_many_prompts_does_not_look_at_all_of_them_whenever_one_ends():
    looks = 0

    class Ends:
        @property
        def finished(self) -> bool:
            nonlocal looks
            looks += 1
            return self in ended

    requests, ended = [Ends() for _ in range(999)], set()
    job = Job(cast(Any, SimpleNamespace(requests=requests)))
    for request in [*requests[1::2], *requests[::2]]:
        assert not job.has_ended()
        ended.add(request)
    assert job.has_ended()
    assert looks < 3 * len(requests)


def test_a_model_that_cannot_be_warmed_up_closes_the_session_at_once(monkeypatch):
    cold, error, tries = optimized(), RuntimeError("no memory"), []

    def fails(progress: bool) -> None:
        tries.append(progress)
        raise error

    monkeypatch.setattr(cold, "_warm_up", fails)
    session = cold.session()
    streams = [session.submit(prompt(5), max_new_tokens=2)]
    with contextlib.suppress(SessionError):  # closed by then
        streams.append(session.submit(prompt(6), max_new_tokens=2))
    for stream in streams:
        with pytest.raises(RuntimeError, match="no memory"):
            stream.result(WAIT)
    with pytest.raises(RuntimeError, match="no memory"):
        session.close(wait=True)
    assert (session.failure, len(tries)) == (error, 1)


def test_progress_counts_no_warm_up_and_comes_to_no_end_where_a_call_fails(monkeypatch, capfd):
    cold, now = optimized(), [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    warm_up = cold._warm_up

    def slow(progress: bool) -> None:
        now[0] += 99
        warm_up(progress)

    monkeypatch.setattr(cold, "_warm_up", slow)
    cold.generate([prompt(5)], max_new_tokens=3, progress=True)
    assert capfd.readouterr().err == "tokens: 3/3 in 0 s\n"

    def fails(ids: Tensor, scores: None) -> bool:
        raise _Mine

    with pytest.raises(_Mine):
        cold.generate([prompt(5)], max_new_tokens=3, progress=True, stopping_criteria=[fails])
    assert capfd.readouterr().err == ""
