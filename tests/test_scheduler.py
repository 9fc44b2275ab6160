"""`scheduler`: calls of several prompts each, in one set of rows; `generate` has one of them, a session many of one."""

import contextlib
import gc
import weakref
from typing import Any

from torch import Tensor

from emssd_compile.calls import read_call
from emssd_compile.jobs import Job, Jobs
from emssd_compile.scheduler import Scheduler
from tests.export.subjects import prompt
from tests.sessions import ROWS, SAMPLED, fast, twin


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


def test_what_generate_raises_is_gone_when_nobody_holds_it():
    """What an exception of a user's code holds, such as tensors of its frames, waits for no garbage collection."""
    raised: list[weakref.ref[BaseException]] = []

    def fails(ids: Tensor, scores: None) -> bool:
        error = _Mine()
        raised.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    gc.disable()
    try:
        with contextlib.suppress(_Mine):
            fast().generate([prompt(5)], max_new_tokens=3, stopping_criteria=[fails])
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
