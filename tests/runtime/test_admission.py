"""`admission`: requests of one prompt share its reading, and nobody waits for what is not being read."""

from collections import deque
from collections.abc import Callable, Collection
from typing import cast

import torch
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.runtime.admission import next_request, rows_with_prompt
from emssd_compile.runtime.kv_memory import Beginning, KVMemory
from emssd_compile.runtime.requests import Request, Row


def _request(index: int, group: int | None, length: int = 5, emitted: int = 0) -> Request:
    return Request(index, torch.zeros(length, dtype=torch.int64), 4, group=group, output=[7] * emitted)


def _indices(requests: list[Request]) -> list[int]:
    return [request.index for request in requests]


class _Memory:
    """Has room for requests, and reads what some of them would share.

    Args:
        fits: whether there is room for one.
        reads: indices of those who would share what is being read.
    """

    def __init__(self, fits: Callable[[Request], bool] = lambda _: True, reads: Collection[int] = ()) -> None:
        self._fits, self._reads = fits, reads

    def is_being_read(self, request: Request) -> bool:
        return request.index in self._reads

    def plan(self, request: Request, sources: list[int]) -> Beginning | None:
        return Beginning(request, 0, next(iter(sources), None)) if self._fits(request) else None


def _start(waiting: deque[Request], rows: list[Row | None], memory: _Memory | None = None) -> list[Request]:
    """Start in free rows what can start."""
    started = []
    for b in [b for b, row in enumerate(rows) if row is None]:
        beginning = next_request(waiting, rows, cast(KVMemory, memory or _Memory()))
        if beginning is None:
            break
        waiting.remove(beginning.request)
        assert beginning.source == next(iter(rows_with_prompt(beginning.request, rows)), None)
        rows[b] = Row(beginning.request, len(beginning.request.prompt))
        started.append(beginning.request)
    return started


def test_the_first_of_a_group_reads_and_the_others_wait():
    waiting = deque(_request(i, i // 3) for i in range(6))
    assert _indices(_start(waiting, [None] * 4)) == [0, 3]
    assert _indices([*waiting]) == [1, 2, 4, 5]


def test_once_a_row_has_read_the_prompt_they_start_from_it():
    rows = [Row(_request(0, 0, emitted=1), 1), None, Row(_request(3, 1), 5), None]
    waiting = deque([_request(1, 0), _request(2, 0), _request(4, 1)])
    assert [rows_with_prompt(_request(9, group), rows) for group in (0, 1, 2)] == [[0], [], []]
    assert _indices(_start(waiting, rows)) == [1, 2]


def test_prompts_of_one_token_and_requests_without_a_group_share_nothing():
    waiting = deque([_request(0, 0, length=1), _request(1, 0, length=1), _request(2, None), _request(3, None)])
    assert _indices(_start(waiting, [None] * 4)) == [0, 1, 2, 3]
    assert rows_with_prompt(_request(9, 0, length=1), [Row(_request(0, 0, length=1, emitted=2), 1)]) == []


def test_nobody_overtakes_who_waits_for_memory():
    waiting = deque(_request(i, i, length=9 if i == 1 else 2) for i in range(3))
    assert _indices(_start(waiting, [None] * 3, _Memory(lambda request: len(request.prompt) < 9))) == [0]
    assert _indices([*waiting]) == [1, 2]


def test_who_would_share_what_is_being_read_waits_and_others_overtake():
    waiting = deque(_request(i, i, length=9 if i == 3 else 2) for i in range(5))
    memory = _Memory(lambda request: len(request.prompt) < 9, reads=(0, 2))
    assert _indices(_start(waiting, [None] * 5, memory)) == [1], "and nobody overtakes who waits for memory"
    assert _indices([*waiting]) == [0, 2, 3, 4]


@given(
    groups=st.lists(st.sampled_from([None, 0, 1, 2]), max_size=9),
    busy=st.lists(st.none() | st.tuples(st.sampled_from([None, 0, 1, 2]), st.integers(0, 1)), max_size=4),
)
def test_nobody_is_lost_and_nobody_waits_for_nothing(groups, busy):
    rows = [None if row is None else Row(_request(100 + b, row[0], emitted=row[1]), 1) for b, row in enumerate(busy)]
    waiting = deque(_request(i, group) for i, group in enumerate(groups))
    free = rows.count(None)
    started = _start(waiting, rows)
    assert sorted(_indices(started) + _indices([*waiting])) == [*range(len(groups))]
    assert _indices([*waiting]) == sorted(_indices([*waiting]))
    assert len(started) <= free
    if len(started) < free:  # whoever waits still, waits for a row that reads
        reading = {request.group for request in started} | {row.request.group for row in rows if row}
        assert all(request.group in reading for request in waiting)
        assert not any(rows_with_prompt(request, rows) for request in waiting)
