"""Which requests start next: first come, first served; prompts that begin alike share the reading of that."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from emssd_compile.runtime.kv_memory import Beginning, KVMemory
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

    def take(self, rows: Sequence[Row | None], memory: KVMemory) -> Beginning | None:
        """Take the request that is to start next in a free row; None where all wait for something.

        Args:
            rows: what each row decodes, None where it is free.
            memory: who waits for it is not overtaken.
        """
        beginning = next_request(self._requests, rows, memory)
        if beginning is not None:
            self._requests.remove(beginning.request)
        return beginning


def next_request(waiting: Iterable[Request], rows: Sequence[Row | None], memory: KVMemory) -> Beginning | None:
    """The first of those that wait; but whose prompt is being read, or how it begins, waits until it is.

    Args:
        waiting: in order.
        rows: what each row decodes, None where it is free.
        memory: what the request starts in.
    """
    reading = {row.request.group for row in rows if row and not row.request.output} - {None}
    for request in waiting:
        sources = rows_with_prompt(request, rows)
        is_read_whole = request.group in reading and _is_shared(request)
        if not sources and (is_read_whole or memory.is_being_read(request)):
            continue
        return memory.plan(request, sources)
    return None


def rows_with_prompt(request: Request, rows: Sequence[Row | None]) -> list[int]:
    """The busy rows that have read all of the request's prompt, since they decode others of its group."""
    if not _is_shared(request):
        return []
    alike = ((b, row) for b, row in enumerate(rows) if row and row.request.group == request.group)
    return [b for b, row in alike if row.request.output]


def _is_shared(request: Request) -> bool:
    """Whether there is anything that it could share: the last token of a prompt is fed by each."""
    return request.group is not None and len(request.prompt) > 1
