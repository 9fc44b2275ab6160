"""How sessions and their requests end: closed in any state, dropped, by what callbacks raise, by a step that fails."""

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import Tensor

from emssd_compile.errors import OptionError, SessionError
from emssd_compile.session import Session
from tests.export.subjects import prompt
from tests.sessions import NEW, SAMPLED, WAIT, alone, fast, held, optimized


class _Streamer:
    """Raises at a call of a method."""

    def __init__(self, method: str = "", at: int = 0) -> None:
        self.calls: list[str] = []
        self._method, self._at = method, at

    def _note(self, method: str) -> None:
        self.calls.append(method)
        if method == self._method and self.calls.count(method) == self._at:
            raise ZeroDivisionError(f"the {self._at}th {method}")

    def put(self, value: Tensor) -> None:
        self._note("put")

    def end(self) -> None:
        self._note("end")


def _criterion(ids: Tensor, scores: None) -> bool:
    if ids.shape[1] == 10:
        raise ZeroDivisionError("the criterion")
    return False


def _hook(context: Any) -> Any:
    if int(context.known[0]) >= 10:
        raise ZeroDivisionError("the hook")
    return context.logits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"streamer": _Streamer("put", 1)}, "the 1th put"),
        ({"streamer": _Streamer("put", 4)}, "the 4th put"),
        ({"streamer": _Streamer("end", 1)}, "the 1th end"),
        ({"stopping_criteria": [_criterion]}, "the criterion"),
        ({"logits_hook": _hook}, "the hook"),
    ],
)
def test_what_a_callback_raises_ends_its_request_alone_and_is_raised_to_its_readers(given, message):
    with fast().session() as session:
        beside = session.submit(prompt(4), max_new_tokens=30)
        broken = session.submit(prompt(5), max_new_tokens=NEW, **given)
        after = [session.submit(prompt(n), max_new_tokens=NEW) for n in (6, 7)]
        with pytest.raises(ZeroDivisionError, match=message):
            list(broken)
        with pytest.raises(ZeroDivisionError, match=message):
            broken.result(WAIT)
        with pytest.raises(ZeroDivisionError, match=message):
            asyncio.run(_read(broken))
    assert broken.finish_reason == "error"
    assert [*prompt(5), *broken.tokens] == alone(prompt(5))[: 5 + len(broken.tokens)]
    assert beside.result() == alone(prompt(4), max_new_tokens=30)
    assert [stream.result() for stream in after] == [alone(prompt(n)) for n in (6, 7)]


async def _read(stream: Any) -> list[int]:
    return [token async for token in stream]


def _raise_while_reading(stream: Any) -> None:
    with contextlib.suppress(ZeroDivisionError), stream:
        for _ in stream:
            raise ZeroDivisionError


def _break_off(stream: Any) -> None:
    with stream:
        for _ in stream:
            break


def _cancel_the_task(stream: Any) -> None:
    async def read(began: asyncio.Event) -> None:
        async with stream:
            async for _ in stream:
                began.set()

    async def main() -> None:
        began = asyncio.Event()
        task = asyncio.create_task(read(began))
        await asyncio.wait_for(began.wait(), WAIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


@pytest.mark.parametrize("leave", [_raise_while_reading, _break_off, _cancel_the_task])
def test_leaving_the_with_of_a_stream_ends_its_request_alone(leave):
    calls, left = list[None](), threading.Event()

    def hold(ids: Tensor, scores: None) -> bool:
        calls.append(None)
        return len(calls) == 2 and not left.wait(WAIT)  # the first tokens are read by then

    with fast().session() as session:
        beside = session.submit(prompt(4), max_new_tokens=40)
        stream = session.submit(prompt(5), max_new_tokens=40, stopping_criteria=[hold])
        leave(stream)
        left.set()
    assert stream.finish_reason == "cancelled"
    assert stream.result() == alone(prompt(5), max_new_tokens=40)[: 5 + len(stream.tokens)]
    assert beside.result() == alone(prompt(4), max_new_tokens=40)


def test_a_reader_that_only_stops_reading_ends_nothing():
    with fast().session() as session:
        stream = session.submit(prompt(5), max_new_tokens=NEW)
        for _ in stream:
            break
        assert stream.result(WAIT) == alone(prompt(5))
        with stream:
            pass
    assert stream.finish_reason == "length"


def test_a_streamer_hears_of_every_end():
    streamers = [_Streamer() for _ in range(3)]
    with fast().session() as session, held(session, streamer=streamers[0]) as stream:
        session.submit(prompt(3), max_new_tokens=NEW, streamer=streamers[1])
        session.submit(prompt(3), max_new_tokens=NEW)
        session.submit(prompt(3), max_new_tokens=NEW, streamer=streamers[2]).cancel()
        stream.cancel()
    assert [streamer.calls.count("end") for streamer in streamers] == [1, 1, 1]


def _broken_step(fast: Any) -> Any:
    """Raises in the third step from now on."""
    launch, calls = fast._engine.launcher.launch, []

    def failing(sizes: Any) -> Any:
        calls.append(sizes)
        if len(calls) == 3:
            raise RuntimeError("the step")
        return launch(sizes)

    return failing


def test_a_step_that_fails_is_raised_to_all_and_closes_the_session(monkeypatch):
    session = fast().session()
    with held(session) as stream:
        others = [session.submit(prompt(n), max_new_tokens=NEW) for n in (2, 3, 4)]
        monkeypatch.setattr(fast()._engine.launcher, "launch", _broken_step(fast()))
    for each in (stream, *others):
        with pytest.raises(RuntimeError, match="the step"):
            each.result(WAIT)
        assert each.finish_reason == "error"
    with pytest.raises(SessionError, match="the session is closed; a step of it failed: RuntimeError"):
        session.submit(prompt(2), max_new_tokens=1)
    with pytest.raises(RuntimeError, match="the step"):
        session.close(wait=True)
    session.close()
    assert session.closed
    monkeypatch.undo()
    assert fast().generate([prompt(9)], max_new_tokens=NEW) == [alone(prompt(9))]
    assert not fast()._engine.tensors["active"].any()


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("state", ["nothing submitted", "idle", "running", "waiting", "closed"])
def test_closing_ends_everything_or_lets_it_finish(state, wait):
    session = fast().session()
    streams = []
    if state in ("idle", "closed"):
        streams = [session.submit(prompt(5), max_new_tokens=NEW)]
        streams[0].result(WAIT)
    if state == "closed":
        session.close(wait=wait)
    if state in ("running", "waiting"):
        with held(session) as stream:
            more = [session.submit(prompt(5), max_new_tokens=NEW) for _ in range(4 if state == "waiting" else 0)]
            streams = [stream, *more]
            closing = threading.Thread(target=session.close, args=(wait,))
            closing.start()
            while not session.closed:
                time.sleep(0.001)
        closing.join(WAIT)
        assert not closing.is_alive()
    session.close(wait=wait)
    assert session.closed
    finished = wait or state in ("idle", "closed")
    assert {stream.finish_reason for stream in streams} <= {"length" if finished else "cancelled"}
    for stream in streams:
        assert stream.result() == [*prompt(5), *stream.tokens] == alone(prompt(5))[: 5 + len(stream.tokens)]
    with pytest.raises(SessionError, match="submit: the session is closed; open another one"):
        session.submit(prompt(2), max_new_tokens=1)
    assert fast().generate([prompt(9)], max_new_tokens=NEW) == [alone(prompt(9))]


def test_leaving_by_an_exception_cancels_and_whoever_waits_for_room_is_told():
    with ThreadPoolExecutor(1) as pool:
        session = fast().session(max_queue=0)
        left: list[Any] = []
        with pytest.raises(KeyError):
            _leave(session, pool, left)
        stream, waiting = left
        with pytest.raises(SessionError, match="closed"):
            waiting.result(WAIT)
    assert stream.finish_reason == "cancelled"


def _leave(session: Session, pool: ThreadPoolExecutor, left: list[Any]) -> None:
    with session, held(session, max_new_tokens=50) as stream:
        session.submit(prompt(3), max_new_tokens=50)
        left += [stream, pool.submit(session.submit, prompt(2), max_new_tokens=1, timeout=None)]
        raise KeyError


def test_weights_that_were_changed_are_followed_between_requests():
    model = optimized()
    with model.session() as session:
        before = session.submit(prompt(5), max_new_tokens=NEW).result(WAIT)
        while session.num_requests[0]:
            time.sleep(0.001)
        for parameter in model.parameters():
            parameter.data = parameter.data.flip(0)
        after = session.submit(prompt(5), max_new_tokens=NEW).result(WAIT)
    assert before == alone(prompt(5)) != after
    assert [after] == model.generate([prompt(5)], max_new_tokens=NEW)


def test_a_form_that_cannot_be_had_ends_who_asked_for_it(monkeypatch):
    model = optimized()
    select = model._select

    def failing(used: Any, *, hooked: bool) -> None:
        if "do_sample" in used:
            raise OptionError("no such form")
        select(used, hooked=hooked)

    monkeypatch.setattr(model, "_select", failing)
    with model.session() as session:
        beside = session.submit(prompt(4), max_new_tokens=20)
        sampled = session.submit(prompt(4), max_new_tokens=20, seed=1, **SAMPLED)
        with pytest.raises(OptionError, match="no such form"):
            sampled.result(WAIT)
    assert beside.result() == alone(prompt(4), max_new_tokens=20)


@pytest.mark.usefixtures("little_garbage")
def test_nothing_of_a_request_that_has_ended_is_kept_while_others_run():
    def submitted(session: Session, **options: Any) -> tuple[Any, list[weakref.ref[Any]]]:
        """A request, and all that only it should keep."""
        criterion, streamer, call = _Criterion(), _Streamer(), _Criterion()
        given: dict[str, Any] = {"stopping_criteria": [criterion], "streamer": streamer, "logits_hook": _Criterion()}
        stream = session.submit(prompt(3), **{"max_new_tokens": 4, **given, **options})
        stream.add_done_callback(call)
        kept = (criterion, streamer, given["logits_hook"], call, stream._ticket, stream._ticket.request)
        return stream, [weakref.ref(each) for each in kept]

    with fast().session() as session:
        first, refs = submitted(session)
        with held(session, max_new_tokens=50) as long:
            cancelled, more = submitted(session, max_new_tokens=40)
            waiting, others = submitted(session, max_new_tokens=40)
            cancelled.cancel()
            waiting.cancel()
            refs += more + others
        for stream in (first, cancelled, waiting):
            stream.result(WAIT)
        del first, cancelled, waiting, stream
        next(token for n, token in enumerate(long) if n == 20)
        assert not long.done, "all of this while it runs"
        gc.collect()
        assert [ref() for ref in refs if ref() is not None] == []


class _Criterion:
    """A criterion, a hook or a callback that leaves everything as it is."""

    def __call__(self, given: Any, scores: None = None) -> Any:
        return getattr(given, "logits", False)
