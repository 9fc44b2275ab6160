"""The requests of a session: those that wait for a row, and those that have one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from emssd_compile.errors import QueueFullError, SessionError
from emssd_compile.runtime.requests import Request
from emssd_compile.stream import Ticket


class Tickets:
    """First come, first served, and no more than may wait. Any thread may put; what else changes it is for one thread.

    Args:
        num_rows: how many can have a row.
        max_queue: most that wait while all rows are busy.
        refusal: why no more are taken; None as long as they are.
    """

    def __init__(self, num_rows: int, max_queue: int, refusal: Callable[[], SessionError | None]) -> None:
        self._most, self._max_queue, self._refusal = max_queue + num_rows, max_queue, refusal
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}  # by the number of the request
        self._changed = threading.Condition()  # guards the two, and how many there ever were
        self._count = 0

    def put(self, ticket: Ticket, timeout: float | None) -> None:
        """Let it wait behind all others, and number its request.

        Args:
            ticket: of the request.
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
            ticket.request.group = self._count  # a prompt of its own
            self._count += 1
            self._waiting.append(ticket)

    def has_room(self) -> bool:
        """Whether one more may wait."""
        return len(self._waiting) + len(self._running) < self._most

    def tell(self) -> None:
        """Have those that wait for room look again."""
        with self._changed:
            self._changed.notify_all()

    def start(self, ticket: Ticket) -> None:
        """One that waits has a row."""
        with self._changed:
            self._waiting.remove(ticket)
            self._running[_number(ticket.request)] = ticket

    def remove(self, ticket: Ticket) -> None:
        """One that waits or runs has ended."""
        with self._changed:
            if self._running.pop(_number(ticket.request), None) is None:
                self._waiting.remove(ticket)
            self._changed.notify_all()

    def running(self, request: Request) -> Ticket:
        """The one of a request that has a row."""
        return self._running[_number(request)]

    def counts(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def first(self) -> Ticket:
        """Of those that wait; there is one."""
        return self._waiting[0]

    def waiting(self) -> Iterator[Ticket]:
        """Those that wait, in order, without a copy: none may be started or removed while this is read."""
        place = 0
        while place < len(self._waiting):
            yield self._waiting[place]
            place += 1

    def all_running(self) -> list[Ticket]:
        """Those that have a row."""
        with self._changed:
            return [*self._running.values()]

    def all(self) -> list[Ticket]:
        """Those that wait, in order, and those that have a row."""
        with self._changed:
            return [*self._waiting, *self._running.values()]


def _number(request: Request) -> int:
    """Of a request among those of its session."""
    assert request.group is not None
    return request.group
