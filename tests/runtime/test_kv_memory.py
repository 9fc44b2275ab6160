"""`kv_memory`: whatever starts, grows and ends, no row runs dry, and none can write to a block that another one has."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from emssd_compile.runtime.kv_memory import Pages
from emssd_compile.runtime.requests import Request
from emssd_compile.step.paging import Paging
from emssd_compile.step.signature import Binding, Signature

ROWS, SIZE, SPARE, CAPACITY = 4, 4, 3, 30
SIGNATURE = Signature((Binding("k_cache_0", (12, SIZE, 1, 1), torch.float32, "pool"),), ())


class _Launcher:
    """Remembers the table, and what was copied: (source, block, count)."""

    def __init__(self) -> None:
        self.table = torch.zeros(0)
        self.copies: list[tuple[int, int, int]] = []

    def upload(self, value: Tensor) -> Tensor:
        return value

    def assign(self, name: str, value: Tensor) -> None:
        self.table = value

    def copy_row(self, names: dict[str, Binding], source: int, row: int, count: int) -> None:
        if names:
            self.copies.append((source, row, count))


class Rows(RuleBasedStateMachine):
    """Requests that start in free rows, behind the prompt of another one or not, grow and end."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(Paging(12, ROWS, CAPACITY, SPARE, block_size=SIZE), SIGNATURE)
        self.launcher = _Launcher()
        self.requests: dict[int, Request] = {}
        self.known: dict[int, int] = {}
        self.writes: dict[int, int] = {}  # the first slot that a row may still write to

    def _start(self, row: int, request: Request, source: int | None, num_read: int) -> None:
        if not self.pages.fits(request, source):
            assert self.requests, "with no row busy, whatever passes `check` fits"
            return
        self.launcher.copies.clear()
        self.pages.start(self.launcher, row, request, source, num_read)  # type: ignore[arg-type]
        self.requests[row], self.known[row] = request, len(request.prompt)
        self.writes[row] = num_read
        if source is not None:
            self.writes[source] = max(self.writes[source], len(request.prompt))
        copied = [(own, count) for _, own, count in self.launcher.copies]
        own = self.pages._held[row].blocks
        assert copied == ([(own[num_read // SIZE], num_read % SIZE)] if source is not None and num_read % SIZE else [])

    @precondition(lambda self: len(self.requests) < ROWS)
    @rule(length=st.integers(1, 20), most=st.integers(1, 10))
    def start(self, length: int, most: int) -> None:
        row = next(row for row in range(ROWS) if row not in self.requests)
        self._start(row, Request(0, torch.zeros(length), most), None, 0)

    @precondition(lambda self: 0 < len(self.requests) < ROWS)
    @rule(data=st.data(), most=st.integers(1, 10))
    def start_behind_another(self, data: st.DataObject, most: int) -> None:
        row = next(row for row in range(ROWS) if row not in self.requests)
        source = data.draw(st.sampled_from(sorted(self.requests)))
        prompt = self.requests[source].prompt
        if len(prompt) > 1:
            self._start(row, Request(0, prompt, most), source, len(prompt) - 1)

    @rule(steps=st.integers(0, 3), most=st.integers(1, 4))
    def decode(self, steps: int, most: int) -> None:
        """The host asks for more than the rows then take; never is it refused."""
        self.pages.prepare(self.launcher, {row: known + steps + most for row, known in self.known.items()})  # type: ignore[arg-type]
        for row, request in self.requests.items():
            limit = len(request.prompt) + request.max_new_tokens
            held = min(self.known[row] + steps + most, limit) + SPARE
            line = self.launcher.table[row, : -(-held // SIZE)]
            assert line.ge(0).all()
            assert len({*line.tolist()}) == len(line)
            self.known[row] = min(self.known[row] + steps, limit)
        for row in self.requests:  # what a row may write to is no other row's
            own = {*self.launcher.table[row, self.writes[row] // SIZE :].tolist()} - {-1}
            others = [other for other in self.requests if other != row]
            assert own.isdisjoint(self.launcher.table[others].flatten().tolist())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.requests)))
        self.pages.release(row)
        for kept in (self.requests, self.known, self.writes):
            del kept[row]

    @invariant()
    def nothing_leaks(self) -> None:
        held = {block for own in self.pages._held.values() for block in own.blocks}
        assert self.pages._pool.num_free == 12 - len(held)
        if not self.requests:
            assert self.pages._pool.num_open == 12


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=80, stateful_step_count=25)


def test_a_dry_run_shares_the_pool_among_as_many_rows_as_it_has_blocks_for():
    for blocks, rows, tokens in ((12, 4, 3 * SIZE - SPARE), (40, 4, CAPACITY), (5, 2, 2 * SIZE - SPARE), (2, 1, 5)):
        given = Pages(Paging(blocks, ROWS, CAPACITY, SPARE, block_size=SIZE), SIGNATURE).rehearsal()
        assert (given.rows, given.tokens) == (rows, tokens)
        used = given.tensors["block_table"][given.tensors["block_table"] >= 0].tolist()
        assert sorted(used) == [*range(len(used))]
