"""The thread of a session: it owns the engine, and decodes what is put meanwhile."""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

from emssd_compile.ambient import neutral
from emssd_compile.calls import Call
from emssd_compile.errors import QueueFullError, ReentryError, SessionError
from emssd_compile.jobs import FinishReason, Jobs
from emssd_compile.row_hooks import RowHooks
from emssd_compile.runtime.requests import Request
from emssd_compile.scheduler import Scheduler
from emssd_compile.stream import Ticket

if TYPE_CHECKING:
    from emssd_compile.decoder import Decoder
    from emssd_compile.lowering.halves import LogitsHook

_REFUSAL = (
    "a session of this object is open and decodes in a thread of its own; submit to it, close it first, or load or "
    "optimize a second object"
)
_EXIT_SECONDS = 10  # how long the end of the process waits for a step
_started: weakref.WeakSet[SessionThread] = weakref.WeakSet()


class SessionThread(Scheduler[Ticket]):
    """Decodes what is put, in a thread of its own. What a hook raises ends its request only.

    All that ends a request is done by this thread, between two steps. What it needs to know is told by attributes and a
    bell, which need no lock: a finalizer may run anywhere.

    Args:
        decoder: has the engine; its turn is kept from `open` until the thread ends.
        max_queue: most tickets that wait while all rows are busy.
        options: those that every step honours, whether a request sets them or not.
    """

    def __init__(self, decoder: Decoder, max_queue: int, options: frozenset[str]) -> None:
        self.terms, self.num_rows = decoder._terms, decoder._engine.num_rows
        self.capacity = decoder._engine.memory.capacity
        super().__init__(decoder, Jobs(max_queue, self.num_rows, self._refusal), options)
        self._closing: Literal["", "finish", "cancel"] = ""
        self.failure: BaseException | None = None
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._look_at = 0.0  # when the next deadline is over, if the bell does not ring before
        self._thread = threading.Thread(target=self._work, name="emssd_compile.session", daemon=True)
        self._row_hooks = RowHooks(
            lambda: self._decoder._engine.requests,
            lambda request: self._jobs.of(request).call.hooks,
            lambda request, error: self._end(self._jobs.of(request), "error", error),
        )

    def open(self) -> None:
        """Take the decoder's turn and start. Raises what `Turns.enter` does."""
        turns = self._decoder._turns
        self._turn = turns.enter("session")  # no other engine from now on: a refresh would be refused
        turns.keep(self._turn, _REFUSAL)
        try:
            self._thread.start()
        except BaseException:
            turns.leave()
            raise
        _started.add(self)

    def put(self, ticket: Ticket, timeout: float | None) -> None:
        """Let it wait for a row, behind all others; see `Session.submit`."""
        if not self._decoder._keeps_prefixes:
            ticket.request.scope = None  # whose requests these are is not known
        is_inside = self.is_inside()
        try:
            self._jobs.put(ticket, 0 if is_inside else timeout)
        except QueueFullError:
            if is_inside and timeout != 0:
                raise ReentryError(
                    "submit: the queue is full, and the session's own thread would wait for itself; pass timeout=0"
                ) from None
            raise
        self.wake()

    def _refusal(self) -> SessionError | None:
        """Why no more are taken, if so."""
        if not self.is_closing:
            return None
        why = f"a step of it failed: {self.failure!r}" if self.failure else "open another one"
        error = SessionError(f"submit: the session is closed; {why}")
        error.__cause__ = self.failure
        return error

    def close(self, wait: bool) -> None:
        """Take no more; return when the thread has ended, unless it is the thread that asks."""
        if wait:
            self._closing = self._closing or "finish"
            self.wake()
        else:
            self.stop()
        self._jobs.tell()
        if self.is_inside():
            return
        try:
            self._thread.join()
        except BaseException:  # whoever does not want to wait any more wants no more tokens, either
            self.stop()
            raise
        if wait and self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Cancel all with the next step, and end. Takes no lock."""
        self._closing = "cancel"
        self._turn.refusal = ""  # others may wait again
        self.wake()

    def wake(self) -> None:
        """Something has changed."""
        self._bell.put(None)

    def is_inside(self) -> bool:
        """Whether the thread itself asks."""
        return threading.current_thread() is self._thread

    def num_requests(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        return self._jobs.counts()

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more."""
        return bool(self._closing) or self.failure is not None

    def _work(self) -> None:  # this and what follows is done by the thread
        self._turn.adopt()
        try:
            while self._wait_for_work():
                if self.prepare():
                    self.decode()
        except BaseException as error:
            self.failure = error
        finally:
            self._end_all()
            self._decoder._turns.leave()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to decode; False if nothing will be any more."""
        while True:
            self.update()
            if self._jobs.counts()[1]:
                return True
            if self._closing:
                return False
            self._bell.get()
            self._look_at = 0.0

    def _advance(self, run: Iterator[Request]) -> bool:
        with neutral(self._decoder._default_dtype):  # not for longer: a default dtype belongs to the process
            return super()._advance(run)

    def _hooks_of_steps(self, call: Call) -> tuple[LogitsHook, ...]:
        return (self._row_hooks,)

    def update(self) -> None:
        """End what was cancelled, and what is over its deadline."""
        now = time.monotonic()
        if self._bell.empty() and now < self._look_at:
            return
        while not self._bell.empty():
            self._bell.get()
        self._look_at = math.inf
        for ticket in self._jobs.all():
            if ticket.is_cancelled or self._closing == "cancel":
                self._break_off(ticket, "cancelled")
            elif now >= ticket.ends_at:
                self._break_off(ticket, "deadline")
            else:
                self._look_at = min(self._look_at, ticket.ends_at)

    def _break_off(self, ticket: Ticket, reason: FinishReason) -> None:
        try:
            self._end_streamer(ticket)
        except BaseException as error:
            self._end(ticket, "error", error)
        else:
            self._end(ticket, reason)

    def _end_all(self) -> None:
        self._closing = self._closing or "finish"
        self._jobs.tell()  # who puts now holds the lock that this waits for: from here on nothing is put
        for ticket in self._jobs.all():
            if self.failure is None:
                self._break_off(ticket, "cancelled")
            else:
                self._end(ticket, "error", self.failure)


@atexit.register
def _stop_all() -> None:
    """Let no thread be in the middle of a step when Python is taken down."""
    started = [*_started]
    for thread in started:
        thread.stop()
    for thread in started:
        thread._thread.join(_EXIT_SECONDS)
