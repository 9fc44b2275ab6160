"""`pages`: whatever starts, grows, is cached and ends, no row runs dry, and each reads what is of its own text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from emssd_compile.runtime.pages import Pages
from emssd_compile.runtime.requests import Request
from emssd_compile.step.paging import Paging, Sharing
from emssd_compile.step.signature import Binding, Signature

ROWS, BLOCKS, SIZE, SPARE, CAPACITY = 4, 12, 4, 3, 30
SIGNATURE = Signature((Binding("k_cache_0", (BLOCKS, SIZE, 1, 1), torch.float32, "pool"),), ())


class _Launcher:
    """Remembers the table, and what each slot of the pool holds: the text that it was made of.

    Attributes:
        held: of each block, in each slot.
        copies: how many slots were copied.
    """

    def __init__(self) -> None:
        self.table = torch.zeros(0)
        self.held: list[list[object]] = [[None] * SIZE for _ in range(BLOCKS)]
        self.copies = 0

    def upload(self, value: Tensor) -> Tensor:
        return value

    def assign(self, name: str, value: Tensor) -> None:
        self.table = value

    def copy_row(self, names: dict[str, Binding], source: int, row: int, count: int) -> None:
        if names:
            self.copies += count
            self.held[row][:count] = self.held[source][:count]


class _Text:
    """A row and the slots it has: `read` of its tokens are in them."""

    def __init__(self, request: Request, read: int) -> None:
        self.request, self.read, self.begun = request, read, read

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt.tolist(), *self.request.output]

    def made_of(self, slot: int, lookahead: int) -> object:
        """What a slot holds for good: of whose texts, and of which tokens, those behind it included."""
        return self.request.scope, tuple(self.tokens[: slot + 1 + lookahead])


class Rows(RuleBasedStateMachine):
    """Requests that start in free rows, behind what others have read or not, read, grow and end.

    Texts begin with zeros, so many begin alike.
    """

    sharing: ClassVar[Sharing] = Sharing(lookahead=0, keeps=True)

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(Paging(BLOCKS, ROWS, CAPACITY, SPARE, self.sharing, SIZE), SIGNATURE)
        self.launcher = _Launcher()
        self.texts: dict[int, _Text] = {}

    def _start(self, request: Request, source: int | None) -> None:
        row = next(row for row in range(ROWS) if row not in self.texts)
        if source is None and self.pages.is_being_read(request):
            assert self.texts, "nobody reads it"
            return
        beginning = self.pages.plan(request, [] if source is None else [source])
        if beginning is None:
            assert self.texts, "with no row busy, whatever passes `check` fits"
            return
        self.launcher.copies = 0
        self.pages.start(self.launcher, row, beginning)  # type: ignore[arg-type]
        assert beginning.num_read < len(request.prompt)
        assert self.launcher.copies == (beginning.num_read % SIZE if source is not None else 0)
        if source is None:
            assert request.scope is not None or not beginning.num_read
        self.texts[row] = _Text(request, beginning.num_read)

    @precondition(lambda self: len(self.texts) < ROWS)
    @rule(
        zeros=st.integers(0, 18),
        more=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        most=st.integers(1, 10),
        scope=st.sampled_from([b"", b"salt", None]),
    )
    def start(self, zeros: int, more: list[int], most: int, scope: bytes | None) -> None:
        self._start(Request(0, torch.tensor([0] * zeros + more), most, scope=scope), None)

    @rule()
    def read_all(self) -> None:
        """As many steps as it takes to read all prompts."""
        self._step(count=20, more=1, emitted=0)

    @precondition(lambda self: 0 < len(self.texts) < ROWS)
    @rule(data=st.data(), most=st.integers(1, 10))
    def start_behind_another(self, data: st.DataObject, most: int) -> None:
        """With the prompt that it has read."""
        source = data.draw(st.sampled_from(sorted(self.texts)))
        of = self.texts[source].request
        if len(of.prompt) > 1 and of.output:
            self._start(Request(0, of.prompt, most, scope=of.scope), source)

    @rule(count=st.integers(1, 6), more=st.integers(1, 4), emitted=st.integers(0, 1))
    def decode(self, count: int, more: int, emitted: int) -> None:
        """Some tokens of each row."""
        self._step(count, more, emitted)

    def _step(self, count: int, more: int, emitted: int) -> None:
        """The host asks for more than the rows then take; never is it refused."""
        behind = {row: len(text.tokens) + count + more for row, text in self.texts.items()}
        self.pages.prepare(self.launcher, behind)  # type: ignore[arg-type]
        for row, text in self.texts.items():
            request, before = text.request, text.read
            limit = len(request.prompt) + request.max_new_tokens
            left = len(text.tokens) - before
            if left > count:  # of its prompt
                text.read += count
            elif len(text.tokens) < limit:
                request.output += [emitted] * min(count - left + 1, limit - len(text.tokens))
                text.read = len(text.tokens) - 1
            self._write(row, text, before, min(behind[row], limit) + SPARE)
            self.pages.note_read(row, text.read)

    def _write(self, row: int, text: _Text, before: int, end: int) -> None:
        """What is new, again what was newest before, and rubbish behind it: drafts that were rejected."""
        others = {b for b in self.texts if b != row}
        shared = {*self.launcher.table[sorted(others)].flatten().tolist()} if others else set()
        line, lookahead = self.launcher.table[row].tolist(), self.sharing.lookahead or 0
        first = before if text.read == before else max(text.begun, before - lookahead)
        for slot in range(first, end):
            block = line[slot // SIZE]
            assert block >= 0, "it has run dry"
            assert block not in shared, "another row has it, too"
            made_of = text.made_of(slot, lookahead) if slot < text.read else "rubbish"
            self.launcher.held[block][slot % SIZE] = made_of

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.texts)))
        self.pages.release(row)
        del self.texts[row]

    @precondition(lambda self: self.texts)
    @rule()
    def end_all(self) -> None:
        for row in sorted(self.texts):
            self.pages.release(row)
        self.texts.clear()
        self.pages.end_run()

    @precondition(lambda self: not self.texts)
    @rule()
    def forget(self) -> None:
        self.pages.forget()
        assert self.pages.num_kept == 0

    @invariant()
    def each_reads_its_own_text(self) -> None:
        lookahead = self.sharing.lookahead or 0
        for row, text in self.texts.items():
            blocks, known = self.pages._held[row].blocks, len(text.tokens)
            for slot in range(text.read):
                if slot + 1 + lookahead <= (known if slot >= text.begun else text.begun):
                    assert self.launcher.held[blocks[slot // SIZE]][slot % SIZE] == text.made_of(slot, lookahead)

    @invariant()
    def nothing_leaks(self) -> None:
        held = {block for own in self.pages._held.values() for block in own.blocks}
        assert self.pages._pool.num_free == BLOCKS - len(held)
        if not self.texts:
            assert self.pages._pool.num_open == BLOCKS


class RowsThatLookAhead(Rows):
    """A drafter's keys and values in the same blocks are made of the tokens behind them, too."""

    sharing = Sharing(lookahead=2)

    def start_behind_another(self, *args: object, **kwargs: object) -> None:
        """Not here: what it is given of its own begins with what the other one made of other tokens."""


TestRows = Rows.TestCase
TestRowsThatLookAhead = RowsThatLookAhead.TestCase
TestRows.settings = TestRowsThatLookAhead.settings = settings(max_examples=50, stateful_step_count=30)


def test_a_dry_run_shares_the_pool_among_as_many_rows_as_it_has_blocks_for():
    for blocks, rows, tokens in ((12, 4, 3 * SIZE - SPARE), (40, 4, CAPACITY), (5, 2, 2 * SIZE - SPARE), (2, 1, 5)):
        given = Pages(Paging(blocks, ROWS, CAPACITY, SPARE, block_size=SIZE), SIGNATURE).rehearsal()
        assert (given.rows, given.tokens) == (rows, tokens)
        used = given.tensors["block_table"][given.tensors["block_table"] >= 0].tolist()
        assert sorted(used) == [*range(len(used))]


def test_who_waits_for_a_block_waits_while_it_is_read():
    """For the first that is missing, not for those behind it; and not for a row that has gone."""
    pages = Pages(Paging(BLOCKS, ROWS, CAPACITY, SPARE, Sharing(lookahead=0), SIZE), SIGNATURE)
    launcher: Any = _Launcher()
    longer, shorter, other = (
        Request(index, torch.tensor(text), 2, scope=b"")
        for index, text in enumerate([[0] * 14, [0] * 6, [0] * 4 + [1] * 6])
    )
    beginning = pages.plan(longer, ())
    assert beginning is not None
    pages.start(launcher, 0, beginning)
    assert [pages.is_being_read(request) for request in (shorter, other)] == [True, True]
    pages.note_read(0, SIZE - 1)
    assert [pages.is_being_read(request) for request in (shorter, other)] == [True, True]
    pages.note_read(0, SIZE)
    assert [pages.is_being_read(request) for request in (shorter, other)] == [False, False], "what is missing is theirs"
    again = Request(3, torch.tensor([0] * 13), 2, scope=b"")
    assert pages.is_being_read(again)
    pages.note_read(0, 2 * SIZE)
    assert pages.is_being_read(again), "the next one is read, too"
    pages.release(0)
    assert not pages.is_being_read(again)
    assert not pages._readers
