"""Lines go through a session a few at a time, and come back as they end."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from emssd_compile.batch.lines import Line
from emssd_compile.batch.local import continued
from tests.export.subjects import prompt
from tests.sessions import NEW, SAMPLED, WAIT, alone, fast, twin


def _lines(count: int) -> Iterator[Line]:
    return (Line(n + 1, n, "", n, tokens=prompt(n + 1)) for n in range(count))


def test_each_line_gets_its_tokens_and_few_are_read_ahead():
    read: list[int] = []

    def noted() -> Iterator[Line]:
        for line in _lines(20):
            read.append(line.index)
            yield line

    found = {}
    with fast().session(max_queue=3) as session:
        for line, now in continued(session, noted(), at_a_time=5, seed=None, max_new_tokens=NEW):
            found[line.index] = line.tokens + now.tokens
            assert len(read) - len(found) < 5
            assert now.finish_reason == "length"
    assert found == {n: alone(prompt(n + 1)) for n in range(20)}


def test_a_long_one_holds_up_no_other():
    def lengths(ids: Any, scores: Any) -> bool:
        return ids.shape[1] > 8  # ends all but the first early

    lines = [Line(1, 0, "", 0, tokens=prompt(1)), *(Line(n, n, "", n, tokens=prompt(8)) for n in range(1, 10))]
    with fast().session(max_queue=3) as session:
        options: dict[str, Any] = {"max_new_tokens": 50, "stopping_criteria": [lengths]}
        order = [line.id for line, _ in continued(session, lines, at_a_time=5, seed=None, **options)]
    assert sorted(order) == [*range(10)]
    assert order.index(0) > 2


def test_what_is_drawn_is_what_generate_draws():
    with fast().session(max_queue=4) as session:
        options = {"max_new_tokens": NEW, **SAMPLED}
        found = {
            line.index: line.tokens + now.tokens
            for line, now in continued(session, _lines(5), at_a_time=4, seed=11, **options)
        }
    assert [found[n] for n in range(5)] == twin().generate([prompt(n + 1) for n in range(5)], seed=11, **options)


def test_bad_lines_and_what_a_request_raises_are_results_of_their_own():
    def criterion(ids: Any, scores: Any) -> bool:
        if ids[0, :3].tolist() == prompt(3):
            raise ZeroDivisionError("here")
        return False

    lines = [*_lines(4), Line(5, 4, "", 4, error="line 5: bad")]
    with fast().session(max_queue=1) as session:
        options: dict[str, Any] = {"max_new_tokens": NEW, "stopping_criteria": [criterion]}
        found = {
            line.index: (now.error, now.finish_reason)
            for line, now in continued(session, lines, at_a_time=3, seed=None, **options)
        }
    assert found.pop(4) == ("line 5: bad", "error")
    assert found.pop(2) == ("ZeroDivisionError: here", "error")
    assert found == dict.fromkeys((0, 1, 3), ("", "length"))


def test_any_number_of_bad_lines_is_no_end():
    bad = [Line(number, number, "", number, error="bad") for number in range(1, 6)]
    with fast().session(max_queue=1) as session:
        lines = [*bad, *_lines(2), *bad]
        found = [now.finish_reason for _, now in continued(session, lines, at_a_time=2, seed=None, max_new_tokens=NEW)]
    assert sorted(found) == ["error"] * 10 + ["length"] * 2


def test_a_step_that_fails_is_no_fault_of_a_line(monkeypatch):
    submitted = threading.Event()

    def broken(sizes: Any) -> Any:
        assert submitted.wait(WAIT)
        raise RuntimeError("the step")

    def lines() -> Iterator[Line]:
        yield from _lines(9)
        submitted.set()

    session = fast().session(max_queue=9)
    monkeypatch.setattr(fast()._engine.launcher, "launch", broken)
    with pytest.raises(RuntimeError, match=r"^the step$"):
        list(continued(session, lines(), at_a_time=10, seed=None, max_new_tokens=NEW))
    session.close()
