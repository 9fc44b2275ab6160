"""Results of named requests, for whoever asks for them or has a handler."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from emssd_compile.errors import OptionError
from emssd_compile.numeric import shown
from emssd_compile.stream import Stream


class Results:
    """Which requests have not ended, and what came of all. Threads may use it at once.

    A result is transformers' `GenerationOutput`; the last of a request says `is_finished()`.
    """

    def __init__(self) -> None:
        self._open: dict[str, Stream | None] = {}  # by name, those that have not ended
        self._waiting: deque[Any] = deque()  # results that nobody has taken
        self._handlers: dict[str, tuple[Callable[[Any], None], asyncio.AbstractEventLoop]] = {}
        self._changed = threading.Condition()  # guards what is above
        self._num_requests = 0

    def begin(self, request_id: str | None) -> tuple[int, str]:
        """The number of a new request, and its name. Raises OptionError if one of that name has not ended."""
        with self._changed:
            number = self._num_requests
            name = f"req_{number}" if request_id is None else request_id
            if name in self._open:
                raise OptionError(f"request_id={shown(name)}: a request of that name has not ended yet")
            self._num_requests, self._open[name] = number + 1, None
            return number, name

    def follow(self, name: str, stream: Stream) -> None:
        """Its tokens come from here."""
        with self._changed:
            self._open[name] = stream

    def refuse(self, name: str) -> None:
        """Nothing comes of it."""
        with self._changed:
            del self._open[name]
            self._handlers.pop(name, None)
            self._changed.notify_all()

    def cancel(self, name: str) -> None:
        """End it with what it has; without effect if it has ended."""
        with self._changed:
            stream = self._open.get(name)
        if stream is not None:
            stream.cancel()

    def put(self, result: Any) -> None:
        """One more result."""
        with self._changed:
            if result.is_finished():
                del self._open[result.request_id]
            self._deliver(result)
            self._changed.notify_all()

    def get(self, request_id: str | None, timeout: float | None) -> Any:
        """The next result, or the next of one request; None if none comes within `timeout` seconds, or ever."""

        def found() -> Any:
            return next((each for each in self._waiting if request_id in (None, each.request_id)), None)

        def is_over() -> bool:
            return not self._open if request_id is None else request_id not in self._open

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or is_over(), timeout)
            result = found()
            if result is not None:
                self._waiting.remove(result)
            return result

    def handle(self, request_id: str, callback: Callable[[Any], None], loop: asyncio.AbstractEventLoop) -> None:
        """Have results of a request handed to a function in an event loop; also those that wait."""
        with self._changed:
            self._handlers[request_id] = callback, loop
            early = [each for each in self._waiting if each.request_id == request_id]
            for result in early:
                self._waiting.remove(result)
                self._deliver(result)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether all requests have ended, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def drop_handlers(self) -> None:
        """Of requests that never came."""
        with self._changed:
            self._handlers.clear()

    def _deliver(self, result: Any) -> None:
        if result.request_id not in self._handlers:
            self._waiting.append(result)
            return
        callback, loop = self._handlers[result.request_id]
        if result.is_finished():
            del self._handlers[result.request_id]
        with contextlib.suppress(RuntimeError):  # its loop is closed, and nobody is there to hear of it
            loop.call_soon_threadsafe(callback, result)
