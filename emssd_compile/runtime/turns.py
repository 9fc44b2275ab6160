"""One caller at a time: what decodes has one set of rows, and two calls would write into each other's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from emssd_compile.errors import ReentryError, SessionError

_graph = threading.Lock()
_waiting: dict[int, Turns] = {}
"""What each thread waits for, so that threads that would wait for one another for ever are noticed. Under `_graph`."""

_calls: ContextVar[tuple[Turn, ...]] = ContextVar("emssd_compile_calls", default=())
"""The turns within which this code runs; contexts that are copied meanwhile (`asyncio.to_thread`) hold them, too."""


class Turn:
    """One caller's.

    Attributes:
        thread: whose it is.
        refusal: why others are refused, who would wait otherwise; empty if they may wait.
    """

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.refusal = ""

    def adopt(self) -> None:
        """Go on with it in this thread, to its end."""
        self.thread = threading.get_ident()
        _calls.set((*_calls.get(), self))


class Turns:
    """Lets one caller in; another thread waits until it has left. A call from inside the first one is refused.

    Inside means: from what that call runs, such as a stopping criterion or a streamer. Waiting would never end there.
    A plain thread that is started there cannot be told from any other, so it waits: do not wait for it in turn. Nor
    would it end where two threads, each inside a call of one object, call the other's: the second to ask is refused.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._turn: Turn | None = None

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Be the only one until the end of the `with`, however it ends.

        Raises:
            ReentryError: the call that has the turn made this one, or waits for it.
            SessionError: whoever has the turn keeps it, and has others refused.
        """
        turn = self.enter(what)
        token = _calls.set((*_calls.get(), turn))
        try:
            yield
        finally:
            _calls.reset(token)
            self.leave()

    def enter(self, what: str) -> Turn:
        """Be the only one until `leave`; raises what `take` does."""
        me, current = threading.get_ident(), self._turn
        if current is not None:
            self._refuse(what, current)
            if current.thread == me or current in _calls.get():
                raise ReentryError(
                    f"{what} was called from inside a call of the same object that is not over: from a stopping "
                    "criterion, a streamer, or what one of them runs; wait until generate has returned, or load or "
                    "optimize a second object for it"
                )
        self._note_wait(what, me)
        try:
            with self._free:
                while self._turn is not None:
                    self._refuse(what, self._turn)
                    self._free.wait()
                self._turn = Turn(me)
                return self._turn
        finally:
            with _graph:
                del _waiting[me]

    def leave(self) -> None:
        """Let the next one in; any thread may do it for the one that has the turn."""
        with self._free:
            self._turn = None
            self._free.notify()

    def keep(self, turn: Turn, refusal: str) -> None:
        """Have others refused from now on, and those who wait, too: the turn will be long. `refusal` tells them why."""
        with self._free:
            turn.refusal = refusal
            self._free.notify_all()

    @staticmethod
    def _refuse(what: str, turn: Turn) -> None:
        if turn.refusal:
            raise SessionError(f"{what}: {turn.refusal}")

    def _note_wait(self, what: str, me: int) -> None:
        """Note that this thread waits for the turn, unless whoever has it waits for this thread."""
        with _graph:
            holder = self._turn
            while holder is not None and holder.thread in _waiting:
                holder = _waiting[holder.thread]._turn
                if holder is not None and holder.thread == me:
                    raise ReentryError(
                        f"{what} would wait for ever: the thread that has the turn waits for a call that this one is "
                        "inside of; do not call two objects from inside each other's calls in two threads"
                    )
            _waiting[me] = self
