"""Which requests start next: first come, first served; those of one prompt share its reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from emssd_compile.runtime.requests import Request, Row

Fits = Callable[[Request], bool]
"""Whether there is memory for a request to start now and go on to its end."""


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

    def take(self, rows: Sequence[Row | None], fits: Fits) -> Request | None:
        """Take the request that is to start next in a free row; None where all wait for something.

        Args:
            rows: what each row decodes, None where it is free.
            fits: asked of the one whose turn it is; who comes behind does not overtake it.
        """
        return next_request(self._requests, rows, fits)


def next_request(waiting: deque[Request], rows: Sequence[Row | None], fits: Fits) -> Request | None:
    """Take the first of those that wait; but whose prompt is being read, waits until it is.

    Args:
        waiting: loses what is returned.
        rows: what each row decodes, None where it is free.
        fits: whether there is memory for it.
    """
    reading = {row.request.group for row in rows if row and not row.request.output} - {None}
    for place, request in enumerate(waiting):
        if request.group in reading and _is_shared(request) and row_with_prompt(request, rows) is None:
            continue
        if not fits(request):
            return None
        del waiting[place]
        return request
    return None


def row_with_prompt(request: Request, rows: Sequence[Row | None]) -> int | None:
    """A busy row whose cache holds all of the request's prompt, as another of its group has read it; None without."""
    if not _is_shared(request):
        return None
    alike = ((b, row) for b, row in enumerate(rows) if row and row.request.group == request.group)
    return next((b for b, row in alike if row.request.output), None)


def _is_shared(request: Request) -> bool:
    """Whether there is anything that it could share: the last token of a prompt is fed by each."""
    return request.group is not None and len(request.prompt) > 1
