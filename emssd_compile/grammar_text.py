"""How far a grammar has read what is generated for a row, and its walk over the row's drafts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from emssd_compile.errors import GrammarError
from emssd_compile.grammar import Grammar
from emssd_compile.runtime.requests import Request

Path = tuple[int, ...]
"""The drafts on the way from what is decided to a node, its own token included."""
Node = tuple[Path, int]
"""A node's path, and its place in R."""


class Stop(NamedTuple):
    """A node whose mask is asked for: its text, path, place in R, and whether the text may end behind it."""

    text: GrammarText
    path: Path
    place: int
    may_end: bool


class GrammarText:
    """What is generated for a request, as far as its grammar has read it.

    Attributes:
        request: whose text it is.
        matcher: stands behind what is decided, but while it walks.
    """

    def __init__(self, request: Request, grammar: Grammar, eos: Iterable[int], ends: Iterable[int]) -> None:
        self.request, self.matcher = request, grammar.start()
        self._grammar, self._eos, self._ends = grammar, frozenset(eos), frozenset(ends)
        self._read: list[int] = []
        self._barred: dict[Path, str] = {}  # nodes of the last step behind which there is nothing, and why

    def follow(self, count: int, newest: Sequence[int]) -> None:
        """Read on: `count` tokens are decided, and `newest` are the last of them."""
        self._read_on(newest[len(newest) - (count - len(self._read)) :])

    def settle(self) -> None:
        """Read to the end of the request."""
        self._read_on(self.request.output[len(self._read) :])

    def walk(self, nodes: Iterable[Node]) -> Iterator[Stop]:
        """Stand behind each node that the grammar allows, one after the other, and go back at the end."""
        walked: Path = ()
        for path, place in sorted(nodes):  # in this order each edge is walked once
            if not self._ends.isdisjoint(path) or not all(0 <= token < self._grammar.vocab_size for token in path):
                continue
            shared = _shared(walked, path)
            self._go_back(walked, shared)
            walked = path[: shared + self.matcher.try_consume_tokens(list(path[shared:]))]
            if walked == path:  # asked before its mask is: at a dead end that stops it, and counts as an end then
                yield Stop(self, path, place, self.matcher.is_accepting())
        self._go_back(walked, 0)

    def bar(self, path: Path, why: str) -> None:
        """Note that nothing may follow this node.

        Raises:
            GrammarError: all before it is decided.
        """
        self._barred[path] = why
        if not path:
            raise self._error(why)

    def stop_reason(self, path: Path) -> str:
        """What the matcher says when it is asked for what may follow this node."""
        matcher = self._standing_behind([*self._read, *path])
        matcher.compute_bitmask()
        reason: str = matcher.stop_reason()
        return reason

    def _read_on(self, tokens: Sequence[int]) -> None:
        for count in range(len(tokens)):
            if why := self._barred.get(tuple(tokens[:count])):
                self._read += tokens[:count]
                raise self._error(why)
        self._barred.clear()
        text = list(itertools.takewhile(lambda token: token not in self._eos, tokens))
        taken: int = self.matcher.try_consume_tokens(text)
        self._read += tokens[:taken]
        if taken < len(text) or (taken < len(tokens) and not self.matcher.is_accepting()):
            raise self._error(
                f"token {tokens[taken]} was chosen, which the grammar does not allow; what comes behind its mask, a "
                "filter or an acceptance rule, must choose none of probability 0"
            )

    def _go_back(self, walked: Path, shared: int) -> None:
        """Go back to where only the first `shared` tokens of what was walked are read."""
        if self.matcher.is_error():  # it met a dead end, from where it does not come back
            self.matcher = self._standing_behind([*self._read, *walked[:shared]])
        elif len(walked) > shared:
            self.matcher.rollback(len(walked) - shared)

    def _standing_behind(self, tokens: list[int]) -> Any:
        matcher = self._grammar.start()
        matcher.try_consume_tokens(tokens)
        return matcher

    def _error(self, why: str) -> GrammarError:
        return GrammarError(f"prompt {self.request.group}, behind {len(self._read)} new tokens: {why}")


def _shared(a: Path, b: Path) -> int:
    """How many tokens two paths have in common at their beginnings."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
