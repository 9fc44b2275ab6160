"""While a session is open nobody else decodes, and nobody waits for ever; a dropped one gives its turn back."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from emssd_compile.errors import QueueFullError, ReentryError, SessionError
from emssd_compile.stream import Ticket
from tests.export.subjects import prompt
from tests.sessions import NEW, WAIT, alone, fast

ROOT = Path(__file__).parents[1]


async def _read(stream: Any) -> list[int]:
    return [token async for token in stream]


def test_other_calls_are_refused_by_name_as_long_as_a_session_is_open():
    model = fast()
    with model.session() as session:
        calls: dict[str, Callable[[], object]] = {
            "generate": lambda: model.generate([prompt(3)], max_new_tokens=1),
            "warmup": model.warmup,
            "refresh": model.refresh,
            "session": model.session,
        }
        for what, call in calls.items():
            with pytest.raises(SessionError, match=f"{what}: a session of this object is open"):
                call()
        assert session.submit(prompt(3), max_new_tokens=NEW).result(WAIT) == alone(prompt(3))
    with model.session() as again:
        assert again.submit(prompt(3), max_new_tokens=NEW).result(WAIT) == alone(prompt(3))


def test_a_session_waits_for_a_generate_and_refuses_who_waits_behind_it():
    model, order = fast(), []
    reached, go = threading.Event(), threading.Event()

    def hold(ids: Tensor, scores: None) -> bool:
        reached.set()
        return not go.wait(WAIT)

    def serve() -> list[int]:
        with model.session() as session:
            order.append("session")
            with pytest.raises(SessionError):
                late.result(WAIT)
            return session.submit(prompt(4), max_new_tokens=NEW).result(WAIT)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(model.generate, [prompt(5)], max_new_tokens=NEW, stopping_criteria=[hold])
        assert reached.wait(WAIT)
        second = pool.submit(serve)
        _await_waiters(model, 1)
        late = pool.submit(model.generate, [prompt(6)], max_new_tokens=NEW)
        _await_waiters(model, 2)
        go.set()
        assert first.result(WAIT) == [alone(prompt(5))]
        assert second.result(WAIT) == alone(prompt(4))


def _await_waiters(model: Any, count: int) -> None:
    while len(model._turns._free._waiters) < count:
        time.sleep(0.001)


def test_calls_from_inside_the_sessions_thread_are_refused_and_not_waited_for():
    model = fast()
    seen: list[str] = []

    def call(ids: Tensor, scores: None) -> bool:
        full = session.submit(prompt(2), max_new_tokens=1)
        for attempt, error in (
            (lambda: model.generate([prompt(3)], max_new_tokens=1), SessionError),
            (lambda: asyncio.run(asyncio.to_thread(model.generate, [prompt(3)], max_new_tokens=1)), SessionError),
            (full.result, ReentryError),
            (lambda: next(iter(full)), ReentryError),
            (lambda: asyncio.run(_read(full)), ReentryError),
            (lambda: session.submit(prompt(2), max_new_tokens=1, timeout=None), ReentryError),
        ):
            with pytest.raises(error) as caught:
                attempt()
            seen.append(type(caught.value).__name__)
        session.close(wait=True)
        return True

    with model.session(max_queue=0) as session:
        stream = session.submit(prompt(5), max_new_tokens=NEW, stopping_criteria=[call])
        assert stream.result(WAIT) == alone(prompt(5))[:6]
    assert len(seen) == 6
    with pytest.raises(ReentryError, match="session was called from inside"):
        model.generate([prompt(5)], max_new_tokens=2, stopping_criteria=[lambda ids, scores: bool(model.session())])


def test_a_queue_that_others_fill_while_the_sessions_thread_submits_is_no_matter_of_trying_again(monkeypatch):
    """Room is seen and lost in one moment: what would wait is refused as a call from inside, not as a full queue."""
    seen: list[Exception] = []

    def call(ids: Tensor, scores: None) -> bool:
        for timeout in (None, 5.0, 0):
            try:
                session.submit(prompt(2), max_new_tokens=1, timeout=timeout)
            except (ReentryError, QueueFullError) as error:
                seen.append(error)
        return True

    with fast().session(max_queue=0) as session:
        jobs = session._scheduler._jobs
        put = jobs.put

        def filled_first(ticket: Ticket, timeout: float | None) -> None:
            if session.is_inside() and jobs.has_room():
                with ThreadPoolExecutor(1) as other:
                    other.submit(session.submit, prompt(4), max_new_tokens=1).result(WAIT)
            put(ticket, timeout)

        stream = session.submit(prompt(5), max_new_tokens=NEW, stopping_criteria=[call])
        monkeypatch.setattr(jobs, "put", filled_first)
        stream.result(WAIT)
    assert [*map(type, seen)] == [ReentryError, ReentryError, QueueFullError]


@pytest.mark.usefixtures("little_garbage")
def test_a_session_that_is_dropped_gives_the_turn_back():
    model = fast()
    thread = model.session()._scheduler._thread
    assert model.generate([prompt(9)], max_new_tokens=NEW) == [alone(prompt(9))]
    stream = model.session().submit(prompt(9), max_new_tokens=NEW)
    assert stream.result(WAIT) == alone(prompt(9)), "a stream keeps its session"
    del stream
    session, reached, go = model.session(), threading.Event(), threading.Event()

    def waits(ids: object, scores: object) -> bool:
        reached.set()
        return not go.wait(WAIT)

    session.submit(prompt(5), max_new_tokens=50, stopping_criteria=[waits])
    session.submit(prompt(3), max_new_tokens=50)
    scheduler = session._scheduler
    assert reached.wait(WAIT)
    del session
    gc.collect()
    go.set()
    assert model.generate([prompt(9)], max_new_tokens=NEW) == [alone(prompt(9))]
    for ended in (thread, scheduler._thread):
        ended.join(WAIT)
        assert not ended.is_alive()


def test_a_session_that_is_left_open_keeps_no_process_alive():
    code = """
from tests.sessions import fast
from tests.export.subjects import prompt
session = fast().session()
streams = [session.submit(prompt(5), max_new_tokens=50) for _ in range(9)]
next(iter(streams[0]))
print("left")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
