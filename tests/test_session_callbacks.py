"""`add_done_callback`: called once, with the stream, when its request has ended; what it raises harms nobody."""

import logging
import threading
from typing import Any

from tests.export.subjects import prompt
from tests.sessions import NEW, WAIT, alone, fast, held


def test_it_is_called_once_when_the_request_has_ended_however_it_did():
    seen: list[Any] = []
    with fast().session() as session, held(session) as first:
        streams = [session.submit(prompt(n), max_new_tokens=NEW) for n in (3, 4)]
        for stream in (first, *streams):
            stream.add_done_callback(lambda stream: seen.append((stream, stream.done, stream.tokens)))
        streams[1].cancel()
        assert not seen
    assert {stream for stream, *_ in seen} == {first, *streams}
    assert len(seen) == 3
    assert all(done for _, done, _ in seen)
    assert (streams[0], True, alone(prompt(3))[3:]) in seen


def test_it_is_called_at_once_if_the_request_has_ended():
    with fast().session() as session:
        stream = session.submit(prompt(3), max_new_tokens=NEW)
        stream.result(WAIT)
        threads: list[threading.Thread] = []
        stream.add_done_callback(lambda stream: threads.append(threading.current_thread()))
        assert threads == [threading.current_thread()]


def test_what_it_raises_is_logged_and_the_others_are_called(caplog):
    seen: list[object] = []

    def broken(stream: object) -> None:
        raise ZeroDivisionError("the callback")

    with fast().session() as session, held(session) as first:
        first.add_done_callback(broken)
        first.add_done_callback(seen.append)
        beside = session.submit(prompt(4), max_new_tokens=NEW)
    assert seen == [first]
    assert first.result() == alone(prompt(5))
    assert beside.result() == alone(prompt(4))
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]
    assert "the callback" in caplog.text
