"""Decoding the lines of a batch in this process, through a session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from emssd_compile.batch.lines import Line
from emssd_compile.generation import nth_seed
from emssd_compile.session import Session
from emssd_compile.stream import Stream


@dataclass(frozen=True)
class Continuation:
    """What became of a prompt.

    Attributes:
        tokens: the new ones.
        finish_reason: why there are no more: "eos", "length", "stop" or "error".
        error: what was wrong, if that is the reason.
    """

    tokens: list[int]
    finish_reason: str
    error: str = ""


def continued(
    session: Session, lines: Iterable[Line], *, at_a_time: int, seed: int | None, **options: Any
) -> Iterator[tuple[Line, Continuation]]:
    """Continue each line, and give it back as soon as that has ended: a long one holds up no other.

    Args:
        session: has room for `at_a_time` requests.
        lines: are read when there is room.
        at_a_time: most that are submitted and not given back.
        seed: what `generate` would be given with all prompts; None where nothing is drawn.
        options: of `submit`.

    Raises:
        Exception: what closed the session.
    """
    waiting, ended, running = iter(lines), SimpleQueue[tuple[Line, Stream]](), 0
    while True:
        while running < at_a_time and (line := next(waiting, None)):
            if line.error:
                yield line, Continuation([], "error", line.error)
                continue
            own = None if seed is None else nth_seed(seed, line.index)
            stream = session.submit(line.tokens, seed=own, **options)
            stream.add_done_callback(partial(_note, ended, line))
            running += 1
        if not running:
            return
        line, stream = ended.get()
        running -= 1
        yield line, continuation(session, stream)


def _note(ended: SimpleQueue[tuple[Line, Stream]], line: Line, stream: Stream) -> None:
    ended.put((line, stream))


def continuation(session: Session, stream: Stream) -> Continuation:
    """What became of a request that has ended. Raises what closed the session, if that is why."""
    try:
        stream.result()
    except Exception as error:
        if session.closed:  # all that wait would fail
            raise
        return Continuation([], "error", f"{type(error).__name__}: {error}")
    assert stream.finish_reason is not None
    return Continuation(stream.tokens, stream.finish_reason)
