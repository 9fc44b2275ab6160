"""Many short requests from threads and an event loop, cancelled, late, abandoned, broken: all exact, memory flat."""

import asyncio
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import pytest

from emssd_compile.errors import QueueFullError, SessionError
from emssd_compile.session import Session
from emssd_compile.stream import Stream
from tests.export.subjects import prompt
from tests.sessions import SAMPLED, WAIT, alone, fast

resource = pytest.importorskip("resource", reason="memory is told by the operating system")

THREADS, MOST_NEW = 3, 12
MOST_OBJECTS, MOST_BYTES = 1_000, 24 << 20
"""What may be there after all requests that was not after the first fifth. A kept request would be some 20 objects and
some thousand bytes; the process grows by some MiB by itself, as the allocator pleases."""


KINDS: list[tuple[int, dict[str, Any]]] = [(1, {}), (4, {}), (9, {}), (30, {}), (6, SAMPLED | {"seed": 7})]
"""Lengths of prompts, and options."""


def _whole(length: int, options: dict[str, Any]) -> list[int]:
    """The most new tokens of such a prompt."""
    return alone(prompt(length), max_new_tokens=MOST_NEW, **options)[length:]


@pytest.fixture(autouse=True)
def _known_beforehand() -> None:
    for kind in KINDS:
        _whole(*kind)
    fast().warmup()
    fast().warmup(**SAMPLED)


class _Broken(Exception):
    """What consumers raise."""


class _Reader:
    """Makes requests of all kinds and checks what comes of each; one for each thread."""

    def __init__(self, session: Session, seed: int) -> None:
        self.session, self.draw = session, random.Random(seed)
        self.ends: Counter[str] = Counter()

    def submit(self, **options: Any) -> tuple[Stream, list[int]]:
        """A request, and the tokens of which it gets the first."""
        length, drawn = self.draw.choice(KINDS)
        whole = _whole(length, drawn)
        given: dict[str, Any] = {"max_new_tokens": self.draw.choice([1, 2, 3, MOST_NEW]), **drawn, **options}
        if self.draw.random() < 0.1:
            given["deadline"] = self.draw.random() * 0.05
        try:
            return self.session.submit(prompt(length), timeout=self.draw.choice([0, 0.01]), **given), whole
        except QueueFullError:
            self.ends["queue full"] += 1
            return self.session.submit(prompt(length), timeout=WAIT, **given), whole

    def check(self, stream: Stream, whole: list[int]) -> None:
        """Its tokens are those of `generate`, all of them where it was not ended early."""
        stream.result(WAIT)
        asked, reason = stream._ticket.request.max_new_tokens, stream.finish_reason
        assert stream.tokens == whole[: len(stream.tokens)]
        assert reason in ("length", "cancelled", "deadline")
        assert len(stream.tokens) == asked if reason == "length" else len(stream.tokens) <= asked
        self.ends[str(reason)] += 1

    def one(self) -> None:
        """A request from a thread."""
        way = self.draw.choice(["result", "iterate", "cancel", "abandon", "drop", "break"])
        if way == "break":
            return self._break()
        stream, whole = self.submit()
        if way == "iterate":
            assert [*stream] == stream.tokens
        elif way in ("cancel", "abandon"):
            stop = self.draw.randrange(4)
            for number, _ in enumerate(stream):
                if number == stop:
                    break
        if way == "cancel":
            stream.cancel()
        if way == "drop":
            self.ends["dropped"] += 1
        else:
            self.check(stream, whole)

    def _break(self) -> None:
        """A consumer that raises, in the session's thread."""

        def raising(ids: Any, scores: Any) -> bool:
            raise _Broken

        stream, whole = self.submit(stopping_criteria=[raising])
        try:
            stream.result(WAIT)
        except _Broken:
            self.ends["broken"] += 1
        else:
            self.check(stream, whole)  # its deadline came first

    async def some(self, count: int) -> None:
        """Requests from an event loop, eight at a time, some of whose tasks are cancelled while they wait."""
        for _ in range(0, count, 8):
            await asyncio.gather(*(self._read() for _ in range(8)))

    async def _read(self) -> None:
        stream, whole = self.submit()
        task = asyncio.create_task(_tokens(stream))
        if self.draw.random() < 0.3:
            await asyncio.sleep(self.draw.random() * 0.01)
            task.cancel()
            stream.cancel()
        try:
            assert await task == stream.tokens
        except asyncio.CancelledError:
            self.ends["task cancelled"] += 1
        while not stream.done:
            await asyncio.sleep(0.001)
        self.check(stream, whole)


async def _tokens(stream: Stream) -> list[int]:
    return [token async for token in stream]


def _run(session: Session, count: int, seed: int) -> Counter[str]:
    """So many requests; what became of them."""
    readers = [_Reader(session, seed + number) for number in range(THREADS + 1)]
    each = count // len(readers)

    def requests(reader: _Reader) -> None:
        for _ in range(each):
            reader.one()

    with ThreadPoolExecutor(len(readers)) as pool:
        jobs = [pool.submit(requests, reader) for reader in readers[1:]]
        jobs.append(pool.submit(asyncio.run, readers[0].some(each)))
        for job in jobs:
            job.result()
    return sum((reader.ends for reader in readers), Counter[str]())


def _held() -> tuple[int, int]:
    """Objects that the collector knows, and the most bytes that the process had."""
    gc.collect()
    return len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize("count", [480, pytest.param(10_000, marks=pytest.mark.long)])
def test_tokens_are_right_and_memory_is_flat(count):
    with fast().session(max_queue=6) as session:
        ends = _run(session, count // 5, seed=1)
        objects, used = _held()
        ends += _run(session, count - count // 5, seed=100)
        later_objects, later = _held()
    assert {"length", "cancelled", "deadline", "broken", "task cancelled", "dropped", "queue full"} == {*ends}
    assert sum(ends.values()) - ends["task cancelled"] - ends["queue full"] >= count - 8 * 2 * (THREADS + 1)
    assert later_objects - objects < MOST_OBJECTS
    assert later - used < MOST_BYTES


def _end(threads: set[threading.Thread]) -> None:
    """Wait until these have ended: each ends soon after its session, unless somebody holds that."""
    deadline = time.monotonic() + WAIT
    while running := [thread for thread in threads if thread.is_alive()]:
        assert time.monotonic() < deadline, running
        gc.collect()  # again: what is in use at the moment is kept
        time.sleep(0.01)


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.long)])
def test_sessions_are_opened_and_closed_while_others_submit(times):
    """Whoever opens is refused or let in, whoever submits is refused or served, and what was served is right."""
    own, over, ends = fast(), threading.Event(), Counter[str]()
    earlier = {*threading.enumerate()}  # what another test dropped may still be there
    current: list[Session] = []

    def open_and_close(draw: random.Random) -> None:
        if draw.random() < 0.05:
            assert own.generate([prompt(4)], max_new_tokens=MOST_NEW) == [alone(prompt(4))]
            ends["generate"] += 1
        session = own.session(max_queue=draw.choice([0, 4]))
        current[:] = [session]
        over.wait(draw.random() * 0.3)
        current.clear()
        way = draw.choice(["wait", "cancel", "drop"])
        ends[way] += 1
        if way != "drop":
            session.close(wait=way == "wait")

    def submit(draw: random.Random) -> None:
        if not current:
            over.wait(0.002)
        for session in [*current]:
            reader = _Reader(session, draw.randrange(1 << 30))
            try:
                reader.one()
            finally:
                ends.update(reader.ends)

    def work(act: Callable[[random.Random], None], seed: int) -> None:
        draw, refused = random.Random(seed), 0
        while not over.is_set():
            try:
                act(draw)
            except SessionError:
                refused += 1
                if refused % 20 == 0:
                    gc.collect()  # a raised error holds its reader's frame, that the stream, and that a dropped session
                over.wait(0.002)
            enough = {"length": 30, "cancelled": 1, "wait": 3, "drop": 3, "cancel": 1}
            if all(ends[kind] >= count * times for kind, count in enough.items()):
                over.set()
        ends["refused"] += refused

    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(work, open_and_close, seed) for seed in range(2)]
        jobs += [pool.submit(work, submit, seed) for seed in range(10, 14)]
        ended, running = wait(jobs, WAIT * times, FIRST_EXCEPTION)
        over.set()
        for job in ended:
            job.result()
        assert not running, f"after {WAIT * times} s there were {dict(ends)}"
    assert ends["refused"]
    _end({*threading.enumerate()} - earlier)
    assert own.generate([prompt(9)], max_new_tokens=MOST_NEW) == [alone(prompt(9))]
