"""`Turns`: one thread at a time, in whatever way it leaves; never one inside itself."""

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from emssd_compile.errors import EmssdError, ReentryError, SessionError
from emssd_compile.runtime.turns import Turns


def test_no_two_threads_are_inside_at_once():
    turns, inside, most = Turns(), 0, 0

    def enter(_: int) -> None:
        nonlocal inside, most
        with turns.take("it"):
            inside += 1
            most = max(most, inside)
            threading.Event().wait(0.001)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(32)))
    assert (inside, most) == (0, 1)


def test_whoever_is_inside_is_told_and_stays_inside():
    turns = Turns()
    with turns.take("it"):
        for enter in (lambda: turns.take("it"), lambda: contextvars.Context().run(turns.take, "it")):
            with pytest.raises(ReentryError, match="it was called from inside a call of the same object"), enter():
                pass
        held = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool, pytest.raises(ReentryError):
            pool.submit(held.run, _enter, turns).result()
    with turns.take("it"):
        pass


def _enter(turns: Turns) -> None:
    with turns.take("it"):
        pass


def test_a_copy_of_a_context_is_inside_only_as_long_as_the_call_is():
    turns = Turns()
    with turns.take("it"):
        held = contextvars.copy_context()
    held.run(_enter, turns)


def test_an_exception_ends_the_turn():
    turns = Turns()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), turns.take("it"):
            raise error
    _enter(turns)


def test_two_objects_have_turns_of_their_own():
    with Turns().take("it"), Turns().take("it"):
        _enter(Turns())
    assert issubclass(ReentryError, EmssdError)


def test_whoever_keeps_the_turn_has_others_refused_until_it_leaves_in_another_thread():
    turns, outcomes = Turns(), []

    def wait() -> None:
        with pytest.raises(SessionError, match="it: busy"), turns.take("it"):
            pass
        outcomes.append("refused")

    turn = turns.enter("it")
    waiting = threading.Thread(target=wait)
    waiting.start()
    while not turns._free._waiters:  # type: ignore[attr-defined]
        pass
    turns.keep(turn, "busy")
    waiting.join(10)
    assert outcomes == ["refused"], "who waits already, too"

    def adopt() -> None:
        turn.adopt()
        turn.refusal = ""
        with pytest.raises(ReentryError), turns.take("it"):
            pass
        turns.leave()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(adopt).result(10)
    _enter(turns)


def test_threads_that_would_wait_for_one_another_for_ever_are_told():
    one, other, both_inside = Turns(), Turns(), threading.Barrier(2)
    outcomes = []

    def enter(mine: Turns, theirs: Turns) -> None:
        with mine.take("the outer"):
            both_inside.wait(10)
            try:
                with theirs.take("the inner"):
                    outcomes.append("inside")
            except ReentryError as error:
                outcomes.append(str(error).partition(":")[0])

    threads = [threading.Thread(target=enter, args=pair, daemon=True) for pair in ((one, other), (other, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(outcomes) == ["inside", "the inner would wait for ever"]
