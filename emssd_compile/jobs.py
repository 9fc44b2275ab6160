"""Calls on their way to their ends: which of their requests wait for a row, and what becomes of their tokens."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Literal, TypeVar

from emssd_compile.calls import Call
from emssd_compile.errors import QueueFullError, SessionError
from emssd_compile.runtime.consumer import Consumer
from emssd_compile.runtime.requests import Request

FinishReason = Literal["eos", "length", "stop", "cancelled", "deadline", "error"]
"""Why a request ended: an EOS, its limit of tokens, a stop string or stopping criterion, `cancel` or the session's end,
its `deadline` or `max_time`, or an exception."""


class Job:
    """A call that is decoded.

    Args:
        call: what was asked for.

    Attributes:
        consumer: what its tokens go through, while it runs.
        advance: is told how many tokens are new, whenever there are some.
        error: what ended it, if an exception did.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.consumer: Consumer | None = None
        self.advance: Callable[[int], object] = lambda count: None
        self.error: BaseException | None = None
        self._going = call.requests[::-1]  # those that had not ended when it was asked; the first is the last

    def has_ended(self) -> bool:
        """Whether all of its requests have. To ask each time that one ends costs as much as to look at each once."""
        while self._going and self._going[-1].finished:
            self._going.pop()
        return not self._going

    def deliver(self, request: Request, count: int) -> None:
        """So many new tokens of a request are through the consumer."""
        self.advance(count)

    def finish(self, reason: FinishReason | None, error: BaseException | None = None) -> None:
        """Nothing more follows.

        Args:
            reason: why it was ended; None if its requests ended by themselves.
            error: what ended it, if an exception did.
        """
        self.consumer, self.error = None, error

    def raise_error(self) -> None:
        """Raise what ended it, if an exception did; once, so that it does not hold itself by frames it went through."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error


JobT = TypeVar("JobT", bound=Job)


class Jobs(Generic[JobT]):
    """First come, first served. Any thread may put; what else changes it is for one thread.

    Args:
        max_queue: most requests that wait while all rows are busy; None for no limit.
        num_rows: how many can have a row.
        refusal: why no more are taken; None as long as they are.
    """

    def __init__(
        self,
        max_queue: int | None = None,
        num_rows: int = 0,
        refusal: Callable[[], SessionError | None] = lambda: None,
    ) -> None:
        self._max_queue, self._num_rows, self._refusal = max_queue, num_rows, refusal
        self._waiting: deque[Request] = deque()
        self._job_of: dict[Request, JobT] = {}  # of those that wait or have started
        self._begun: dict[JobT, int] = {}  # how many of its requests have started, if any; in order
        self._changed = threading.Condition()  # guards the three, and how many prompts there ever were
        self._num_prompts = 0

    def put(self, job: JobT, timeout: float | None = 0) -> None:
        """Let its requests wait behind all others, and number its prompts.

        Args:
            job: which.
            timeout: seconds to wait for room; None for as long as it takes.

        Raises:
            QueueFullError: there is none by then.
            SessionError: no more are taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._refusal() or self.has_room(), timeout)
            if refusal := self._refusal():
                raise refusal
            if not self.has_room():
                raise QueueFullError(
                    f"submit: {self._max_queue} requests wait for a row already (max_queue); try again later, or pass "
                    "timeout=... to wait for room"
                )
            requests, before = job.call.requests, self._num_prompts
            for request in requests:
                assert request.group is not None  # of its prompt, among those of its call
                request.group += before
                self._num_prompts = max(self._num_prompts, request.group + 1)
            self._waiting.extend(requests)
            self._job_of.update(dict.fromkeys(requests, job))

    def has_room(self) -> bool:
        """Whether one more may wait."""
        return self._max_queue is None or len(self._job_of) < self._max_queue + self._num_rows

    def tell(self) -> None:
        """Have those that wait for room look again."""
        with self._changed:
            self._changed.notify_all()

    def start(self, request: Request) -> JobT:
        """One that waits has a row; returns its job."""
        with self._changed:
            self._waiting.remove(request)
            job = self._job_of[request]
            self._begun[job] = self._begun.get(job, 0) + 1
            return job

    def remove(self, job: JobT) -> None:
        """One has ended."""
        with self._changed:
            num_waiting = len(job.call.requests) - self._begun.pop(job, 0)
            for request in job.call.requests:
                del self._job_of[request]
                if num_waiting and request in self._waiting:  # a long way through a long queue
                    self._waiting.remove(request)
                    num_waiting -= 1
            self._changed.notify_all()

    def of(self, request: Request) -> JobT:
        """The one of a request that waits or has started."""
        return self._job_of[request]

    def counts(self) -> tuple[int, int]:
        """How many requests have started, of jobs that have not ended, and how many wait."""
        with self._changed:
            waiting = len(self._waiting)
            return len(self._job_of) - waiting, waiting

    def first(self) -> JobT:
        """That of the request that waits longest; there is one."""
        return self._job_of[self._waiting[0]]

    def waiting(self) -> Iterator[Request]:
        """Those that wait, in order, without a copy: none may be started or removed while this is read."""
        place = 0
        while place < len(self._waiting):
            yield self._waiting[place]
            place += 1

    def begun(self) -> list[JobT]:
        """Those of which a request has started."""
        return [*self._begun]

    def all(self) -> list[JobT]:
        """Those that have not ended, in the order they came in."""
        with self._changed:
            return [*dict.fromkeys(self._job_of.values())]
