"""The tokens of one request of a session, as they come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from emssd_compile.calls import Call
from emssd_compile.errors import ReentryError
from emssd_compile.jobs import FinishReason, Job
from emssd_compile.runtime.requests import Request
from emssd_compile.step.probe import READING

if TYPE_CHECKING:
    from emssd_compile.session import Session

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamStats:
    """What a request took, so far or in all.

    Attributes:
        num_tokens: tokens that were handed over.
        num_steps: steps in which it got tokens, its prompt being read.
        num_draft_tokens: drafts that these verified.
        num_accepted_draft_tokens: drafts that were accepted, and followed by another token of their step.
        acceptance_histogram: element i is how many steps that verified drafts accepted exactly i of them.
        num_cached_tokens: tokens of its prompt that were found in the prefix cache, and so not read; None where none
            were looked for: before it starts, or without `prefix_cache=True`.
        time_to_first_token: seconds from `submit` to its first token, waiting included; None before.
        seconds: from `submit` to its end, or until now.
    """

    num_tokens: int
    num_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    acceptance_histogram: tuple[int, ...]
    num_cached_tokens: int | None
    time_to_first_token: float | None
    seconds: float

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens of a step in decoding, the correction or bonus token included; at least 1."""
        return 1.0 + self.num_accepted_draft_tokens / self.num_steps if self.num_steps else 1.0


class Ticket(Job):
    """The job of one request, between the session's thread, which writes, and any number of readers.

    Args:
        call: of one prompt.
        deadline: seconds from now after which it is ended; None for none.

    Attributes:
        request: the one of the call.
        ends_at: when its deadline is over, seconds of `time.monotonic`; inf without one.
        is_cancelled: whether it is to be ended with the next step.
        tokens: those that were handed over; they only become more.
        finish_reason: None as long as it has not ended.
    """

    def __init__(self, call: Call, deadline: float | None) -> None:
        super().__init__(call)
        self._submitted = time.monotonic()
        self.ends_at = math.inf if deadline is None else self._submitted + deadline
        self.is_cancelled = False
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._first: float | None = None
        self._ended: float | None = None
        self._changed = threading.Condition()
        self._sleepers: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()
        self._calls: list[Callable[[], object]] = []

    @property
    def request(self) -> Request:
        """What the engine decodes."""
        return self.call.requests[0]

    def deliver(self, request: Request, count: int) -> None:
        """Hand them over to the readers."""
        with self._changed:
            self.tokens += request.output[len(self.tokens) :]
            if self.tokens and self._first is None:
                self._first = time.monotonic()
            self._wake()

    def finish(self, reason: FinishReason | None, error: BaseException | None = None) -> None:
        """Tell the readers that nothing more follows."""
        with self._changed:
            super().finish(reason, error)
            self.finish_reason, self._ended = reason or self._own_reason(), time.monotonic()
            self._wake()
            calls, self._calls = self._calls, []
        for call in calls:
            _call(call)

    def _own_reason(self) -> FinishReason:
        """Why the request ended by itself."""
        request = self.request
        if request.output and request.output[-1] in request.eos_token_ids:
            return "eos"
        return "length" if not request.finish_reason else "deadline" if request.finish_reason == "deadline" else "stop"

    def when_ended(self, call: Callable[[], object]) -> None:
        """Call it once, when the request has ended; at once if it has."""
        with self._changed:
            if self.finish_reason is None:
                self._calls.append(call)
                return
        _call(call)

    def wait(self, count: int | None, timeout: float | None = None) -> None:
        """Wait until there are more than `count` tokens, or it has ended; None: until it has ended.

        Raises:
            TimeoutError: that took longer.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_more(count), timeout):
                raise TimeoutError(f"the request has not ended within {timeout} seconds; it goes on")

    async def wait_for_more(self, count: int) -> None:
        """As `wait`, in an event loop."""
        with self._changed:
            if self._has_more(count):
                return
            loop = asyncio.get_running_loop()
            sleeper = loop, loop.create_future()
            self._sleepers.add(sleeper)
        try:
            await sleeper[1]
        finally:
            with self._changed:
                self._sleepers.discard(sleeper)

    def stats(self) -> StreamStats:
        """What it took."""
        with self._changed:
            request, now = self.request, time.monotonic() if self._ended is None else self._ended
            return StreamStats(
                len(self.tokens),
                request.num_steps,
                request.num_draft_tokens,
                request.num_accepted_draft_tokens,
                (*request.acceptance_histogram,),
                request.num_cached_tokens,
                None if self._first is None else self._first - self._submitted,
                now - self._submitted,
            )

    def _has_more(self, count: int | None) -> bool:
        return self.finish_reason is not None or (count is not None and len(self.tokens) > count)

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, future in self._sleepers:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody sleeps there any more
                loop.call_soon_threadsafe(_wake_up, future)
        self._sleepers.clear()


def _call(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:
        _logger.exception("a callback of a stream that has ended raised; nobody else hears of it")


def _wake_up(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Stream:
    """The tokens of one request. Made by `Session.submit`.

    `for token in stream` waits for each token, and `async for` lets the event loop run meanwhile. Any number of threads
    and loops may read at once: each iterator gives all tokens, from the first. It ends with the request, whatever ended
    it; if that was an exception, it is raised there.

    A reader that stops reading ends nothing, since others may read on. `with stream` and `async with stream` do: who
    leaves them before the request has ended, by whatever, cancels it.
    """

    def __init__(self, ticket: Ticket, session: Session) -> None:
        self._ticket, self._session = ticket, session  # a session lives as long as one of its streams

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[int]:
        """The new tokens, without the prompt. Raises what ended the request, if an exception did."""
        count = 0
        while True:
            self._refuse_inside("an iteration")
            self._ticket.wait(count)
            if count == len(self._ticket.tokens):
                break
            yield self._ticket.tokens[count]
            count += 1
        self._raise_error()

    async def __aiter__(self) -> AsyncIterator[int]:
        """The same in an event loop."""
        count = 0
        while True:
            self._refuse_inside("an iteration")
            await self._ticket.wait_for_more(count)
            if count == len(self._ticket.tokens):
                break
            yield self._ticket.tokens[count]
            count += 1
        self._raise_error()

    def result(self, timeout: float | None = None) -> Any:
        """Wait until the request has ended: prompt and new tokens, in the kind that the prompt was given in.

        That is `fast.generate([prompt], ...)[0]`; with `return_dict_in_generate` the `GenerateOutput` of that batch of
        one. What was cancelled, or over its deadline, has the tokens that it got until then: see `finish_reason`.

        Args:
            timeout: seconds to wait at most; None for as long as it takes.

        Raises:
            TimeoutError: it has not ended by then; it goes on.
            ReentryError: the session's own thread would wait for itself, in a stopping criterion or streamer.
            Exception: what ended the request, if that was an exception.
        """
        self._refuse_inside("result")
        self._ticket.wait(None, timeout)
        self._raise_error()
        found = self._ticket.call.result(self._session.readings)
        return found if self._ticket.call.chosen.return_dict_in_generate else found[0]

    def told(self, name: str) -> Iterator[Tensor]:
        """What a probe tells of each token, in order: take one for each token that the stream gave, and not before.

        Args:
            name: of the reading, as it is called in a `GenerateOutput`, such as "logprobs". The request asks for it.
        """
        for lines in self._ticket.request.told[f"{READING}{name}"]:
            yield from lines

    def cancel(self) -> None:
        """End the request: its row is free in the next step. Without effect if it has ended."""
        self._ticket.is_cancelled = True
        self._session.wake()

    def add_done_callback(self, call: Callable[[Stream], object]) -> None:
        """Have `call(stream)` called once the request has ended, as `concurrent.futures.Future` does.

        The session's thread calls it, so it should be quick; if the request has ended already, this call does. What it
        raises is logged.
        """
        self._ticket.when_ended(lambda: call(self))

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return [*self._ticket.tokens]

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self.finish_reason is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None as long as it waits or runs."""
        return self._ticket.finish_reason

    @property
    def stats(self) -> StreamStats:
        """What the request took, so far or in all."""
        return self._ticket.stats()

    def _raise_error(self) -> None:
        if self._ticket.error is not None:
            raise self._ticket.error

    def _refuse_inside(self, what: str) -> None:
        if not self.done and self._session.is_inside():
            raise ReentryError(
                f"{what} would wait for ever: it was called by the session's own thread, from a stopping criterion or "
                "a streamer; hand the stream to another thread"
            )
