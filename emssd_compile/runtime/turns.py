"""One caller at a time: what decodes has one set of rows, and two calls would write into each other's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from emssd_compile.errors import ReentryError

_graph = threading.Lock()
_waiting: dict[int, Turns] = {}
"""What each thread waits for, so that threads that would wait for one another for ever are noticed. Under `_graph`."""

_calls: ContextVar[tuple[object, ...]] = ContextVar("emssd_compile_calls", default=())
"""The turns within which this code runs; contexts that are copied meanwhile (`asyncio.to_thread`) hold them, too."""


class Turns:
    """Lets one caller in; another thread waits until it has left. A call from inside the first one is refused.

    Inside means: from what that call runs, such as a stopping criterion or a streamer. Waiting would never end there.
    A plain thread that is started there cannot be told from any other, so it waits: do not wait for it in turn. Nor
    would it end where two threads, each inside a call of one object, call the other's: the second to ask is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: object = None
        self._thread: int | None = None

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Be the only one until the end of the `with`, however it ends.

        Raises:
            ReentryError: the call that has the turn made this one, or waits for it.
        """
        if self._thread == threading.get_ident() or (self._current is not None and self._current in _calls.get()):
            raise ReentryError(
                f"{what} was called from inside a call of the same object that is not over: from a stopping criterion, "
                "a streamer, or what one of them runs; wait until generate has returned, or load or optimize a second "
                "object for it"
            )
        self._wait(what)
        try:
            self._thread, self._current = threading.get_ident(), object()
            token = _calls.set((*_calls.get(), self._current))
            try:
                yield
            finally:
                _calls.reset(token)
        finally:
            self._thread = self._current = None
            self._lock.release()

    def _wait(self, what: str) -> None:
        """Take the lock, unless whoever holds it waits for this thread."""
        me = threading.get_ident()
        with _graph:
            holder = self._thread
            while holder is not None and holder in _waiting:
                holder = _waiting[holder]._thread
                if holder == me:
                    raise ReentryError(
                        f"{what} would wait for ever: the thread that has the turn waits for a call that this one is "
                        "inside of; do not call two objects from inside each other's calls in two threads"
                    )
            _waiting[me] = self
        try:
            self._lock.acquire()
        finally:
            with _graph:
                del _waiting[me]
