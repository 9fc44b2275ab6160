"""The thread of a session: it owns the engine, starts what waits in free rows, and hands tokens over."""

from __future__ import annotations

import atexit
import contextlib
import math
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

from emssd_compile.ambient import neutral
from emssd_compile.calls import Call
from emssd_compile.ends import shared_eos
from emssd_compile.errors import QueueFullError, ReentryError, SessionError
from emssd_compile.row_hooks import RowHooks
from emssd_compile.runtime.admission import Admission
from emssd_compile.runtime.consumer import Consumer
from emssd_compile.runtime.kv_memory import Beginning, KVMemory
from emssd_compile.runtime.requests import Request, Row
from emssd_compile.stream import FinishReason, Ticket
from emssd_compile.tickets import Tickets

if TYPE_CHECKING:
    from emssd_compile.decoder import Decoder

_REFUSAL = (
    "a session of this object is open and decodes in a thread of its own; submit to it, close it first, or load or "
    "optimize a second object"
)
_EXIT_SECONDS = 10  # how long the end of the process waits for a step
_started: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler(Admission):
    """Decodes what is put, first come, first served, in a thread of its own.

    All that ends a request is done by this thread, between two steps. What it needs to know is told by attributes and a
    bell, which need no lock: a finalizer may run anywhere.

    Args:
        decoder: has the engine; its turn is kept from `open` until the thread ends.
        max_queue: most tickets that wait while all rows are busy.
        options: those that every step honours, whether a request sets them or not.
    """

    def __init__(self, decoder: Decoder, max_queue: int, options: frozenset[str]) -> None:
        super().__init__()
        self._decoder, self._options = decoder, options
        self.terms, self.num_rows = decoder._terms, decoder._engine.num_rows
        self.capacity = decoder._engine.memory.capacity
        self._tickets = Tickets(self.num_rows, max_queue, self._refusal)
        self._closing: Literal["", "finish", "cancel"] = ""
        self.failure: BaseException | None = None
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._look_at = 0.0  # when the next deadline is over, if the bell does not ring before
        self._thread = threading.Thread(target=self._work, name="emssd_compile.session", daemon=True)
        self._eos: frozenset[int] = frozenset()  # those that the step knows
        self._used: frozenset[str] | None = None  # options that the form of the step honours; None before any
        self._hooked = False
        self._row_hooks = RowHooks(
            lambda: self._engine.requests,
            lambda request: self._tickets.running(request).call.hooks,
            lambda request, error: self._end(self._tickets.running(request), "error", error),
        )

    def open(self) -> None:
        """Take the decoder's turn and start. Raises what `Turns.enter` does."""
        turns = self._decoder._turns
        self._turn = turns.enter("session")
        self._engine = self._decoder._engine  # no other from now on: a refresh would be refused
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
            self._tickets.put(ticket, 0 if is_inside else timeout)
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
        self._tickets.tell()
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
        return self._tickets.counts()

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more."""
        return bool(self._closing) or self.failure is not None

    def _work(self) -> None:  # this and what follows is done by the thread
        self._turn.adopt()
        try:
            while self._wait_for_work():
                self._decode()
        except BaseException as error:
            self.failure = error
        finally:
            self._end_all()
            self._decoder._turns.leave()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to decode; False if nothing will be any more."""
        while True:
            self.update()
            if self._tickets.counts()[1]:
                return True
            if self._closing:
                return False
            self._bell.get()
            self._look_at = 0.0

    def _decode(self) -> None:
        """Decode until there is nothing to do, or what waits cannot run beside what runs."""
        decoder = self._decoder
        self._eos, self._used, self._hooked = self._tickets.first().request.eos_token_ids, None, False
        with ExitStack() as self._hooks:
            with neutral(decoder._default_dtype):
                decoder._follow()
                if not decoder._is_warm:
                    with contextlib.suppress(Exception):  # raised to the request when it starts
                        self._suit(self._tickets.first().call)
                    decoder._warm_up(progress=False)
            with decoder._running(self, self._eos) as run:
                while self._advance(run):
                    pass

    def _advance(self, run: Iterator[Request]) -> bool:
        with neutral(self._decoder._default_dtype):
            request = next(run, None)
            if request is not None:
                self._hand_over(self._tickets.running(request))
        return request is not None

    def _hand_over(self, ticket: Ticket) -> None:
        """Let new tokens go through the request's consumer to its readers."""
        request, masks = ticket.request, ticket.call.masks
        assert ticket.consumer is not None
        try:
            ticket.consumer.take(request)
            if request.finished and masks is not None:
                masks.settle()
        except BaseException as error:
            self._end(ticket, "error", error)
            return
        ticket.deliver()
        if request.finished:
            self._end(ticket, _reason(ticket))

    def __bool__(self) -> bool:
        """Whether the first that waits can run beside those that do."""
        return self._tickets.counts()[1] > 0 and self._may_start(self._tickets.first())

    def _may_start(self, ticket: Ticket) -> bool:
        """Whether it can run beside those that do: all that need to see their own EOS do."""
        tickets = [ticket, *self._tickets.all_running()]
        shared = shared_eos(each.request for each in tickets)
        looking = (each.request for each in tickets if each.call.looks_at_ends)
        return all(each.eos_token_ids == shared for each in looking)

    def update(self) -> None:
        """End what was cancelled, and what is over its deadline."""
        now = time.monotonic()
        if self._bell.empty() and now < self._look_at:
            return
        while not self._bell.empty():
            self._bell.get()
        self._look_at = math.inf
        for ticket in self._tickets.all():
            if ticket.is_cancelled or self._closing == "cancel":
                self._end(ticket, "cancelled")
            elif now >= ticket.ends_at:
                self._end(ticket, "deadline")
            else:
                self._look_at = min(self._look_at, ticket.ends_at)

    def take(self, rows: Sequence[Row | None], memory: KVMemory) -> Beginning | None:
        """Start the first that waits, if there is memory for it; who waits until others have read is overtaken."""
        while True:
            waiting = (each for each in self._tickets.waiting() if not memory.is_being_read(each.request))
            ticket = next(waiting, None)
            if ticket is None or not self._may_start(ticket):
                return None
            beginning = memory.plan(ticket.request, ())
            if beginning is None:
                return None
            self._tickets.start(ticket)
            if self._start(ticket):
                return beginning

    def _start(self, ticket: Ticket) -> bool:
        """Whether there is a step for it, and its consumer is ready."""
        try:
            self._suit(ticket.call)
            self._tell_eos()
            ticket.consumer = Consumer(ticket.call.prompts, ticket.call.requests, ticket.call.chosen)
        except BaseException as error:
            self._end(ticket, "error", error)
            return False
        return True

    def _suit(self, call: Call) -> None:
        """Drive a form of the step that honours what this call sets, and all that was set since nothing ran."""
        used, hooked = call.used | (self._used or self._options), self._hooked or bool(call.hooks)
        if (used, hooked) != (self._used, self._hooked):
            self._decoder._select(used, hooked=hooked)
            self._hooks.enter_context(self._decoder._calling((self._row_hooks,)))
            self._used, self._hooked = used, hooked

    def _tell_eos(self) -> None:
        """Have the step end rows at what ends all that run."""
        shared = shared_eos(each.request for each in self._tickets.all_running())
        if shared != self._eos:
            self._engine.set_eos([*shared])
            self._eos = shared

    def _end(self, ticket: Ticket, reason: FinishReason, error: BaseException | None = None) -> None:
        """Free its place, and tell its readers."""
        request = ticket.request
        if not request.finished:
            request.end(len(ticket.tokens), reason)
        self._tickets.remove(ticket)
        streamer = ticket.call.chosen.streamer
        if streamer is not None and error is None:
            try:
                streamer.end()
            except BaseException as raised:
                reason, error = "error", raised
        ticket.finish(reason, error)

    def _end_all(self) -> None:
        self._closing = self._closing or "finish"
        self._tickets.tell()  # who puts now holds the lock that this waits for: from here on nothing is put
        for ticket in self._tickets.all():
            self._end(ticket, "error" if self.failure else "cancelled", self.failure)


def _reason(ticket: Ticket) -> FinishReason:
    request = ticket.request
    if request.output and request.output[-1] in request.eos_token_ids:
        return "eos"
    return "length" if not request.finish_reason else "deadline" if request.finish_reason == "deadline" else "stop"


@atexit.register
def _stop_all() -> None:
    """Let no thread be in the middle of a step when Python is taken down."""
    started = [*_started]
    for scheduler in started:
        scheduler.stop()
    for scheduler in started:
        scheduler._thread.join(_EXIT_SECONDS)
