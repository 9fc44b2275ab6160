"""Which requests start next: first come, first served; those of one prompt share its reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from emssd_compile.runtime.requests import Request, Row


class Admission:
    """Requests that wait for a row. The engine asks before each step: more may have come, and some may have been ended.

    Args:
        requests: those that wait from the start, in order.
    """

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self._requests = deque(requests)

    def __bool__(self) -> bool:
        """Whether any request waits that can start in this run."""
        return bool(self._requests)

    def update(self) -> None:
        """A step comes next: end requests here, running ones too, and their rows are free in it."""

    def take(self, rows: Sequence[Row | None], most: int) -> list[Request]:
        """Take up to `most` requests that are to start; `rows` is what each row decodes, None where it is free."""
        return next_requests(self._requests, rows, most)


def next_requests(waiting: deque[Request], rows: Sequence[Row | None], most: int) -> list[Request]:
    """Take up to `most` requests from those that wait, in order; but whose prompt is being read, waits until it is.

    Args:
        waiting: loses what is returned.
        rows: what each row decodes, None where it is free.
        most: how many rows are free.
    """
    if not waiting or most == 0:
        return []
    reading = {row.request.group for row in rows if row and not row.request.output} - {None}
    started: list[Request] = []
    later: list[Request] = []
    while waiting and len(started) < most:
        request = waiting.popleft()
        if request.group in reading and _is_shared(request):
            later.append(request)
            continue
        started.append(request)
        if _is_shared(request) and row_with_prompt(request, rows) is None:
            reading.add(request.group)
    waiting.extendleft(reversed(later))
    return started


def row_with_prompt(request: Request, rows: Sequence[Row | None]) -> int | None:
    """A busy row whose cache holds all of the request's prompt, as another of its group has read it; None without."""
    if not _is_shared(request):
        return None
    alike = ((b, row) for b, row in enumerate(rows) if row and row.request.group == request.group)
    return next((b for b, row in alike if row.request.output), None)


def _is_shared(request: Request) -> bool:
    """Whether there is anything that it could share: the last token of a prompt is fed by each."""
    return request.group is not None and len(request.prompt) > 1
