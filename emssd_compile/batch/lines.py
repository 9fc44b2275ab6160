"""The prompts of a JSONL file, one at a time: memory does not grow with the file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emssd_compile.errors import EmssdError, InvalidInputError, OptionError
from emssd_compile.standard_json import read_json

Read = Callable[[object, str], "tuple[Any, list[int]]"]
"""Makes a prompt and its tokens of what JSON has for it; the text says where it is. Raises EmssdError."""


@dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        number: counted from 1, blank lines, too.
        index: among those that are not blank, from 0.
        text: as it is written; what is no text there is replaced.
        id: what its result is told by: `"id"` or `"custom_id"` of its object, or else its number.
        entry: its object; empty if there is none.
        prompt: what `read` made of it; None if it is bad.
        tokens: of the prompt.
        error: why it is bad; empty if it is not.
    """

    number: int
    index: int
    text: str
    id: int | str
    entry: dict[str, Any] = field(default_factory=dict)
    prompt: Any = None
    tokens: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def key(self) -> str:
        """Its id such that 1 and "1" differ."""
        return json.dumps(self.id)


def read_lines(path: Path, read: Read) -> Iterator[Line]:
    """Each line that is not blank.

    Raises:
        OptionError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            index = 0
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield parse_line(text, number, index, read)
                    index += 1
    except OSError as error:
        raise OptionError(f"--input {path} cannot be read: {error}") from error


def parse_line(text: bytes, number: int, index: int, read: Read) -> Line:
    """One of them, bad or not."""
    line, where = Line(number, index, text.decode(errors="replace"), number), f"line {number}"
    try:
        try:
            entry = read_json(text.decode())
        except ValueError as error:
            raise InvalidInputError(f"{where}: {error}") from error
        if isinstance(entry, dict):
            line = replace(line, entry=entry, id=_find_id(entry, number))
        prompt, tokens = read(entry, where)
        return replace(line, prompt=prompt, tokens=tokens)
    except EmssdError as error:
        return replace(line, error=str(error))


def _find_id(entry: dict[str, Any], number: int) -> int | str:
    found = next((entry[name] for name in ("id", "custom_id") if entry.get(name) is not None), number)
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise InvalidInputError(f"line {number}: its id is {json.dumps(found)}; write a string or an integer")
    return found


class Index:
    """Which ids there are, and which are done. On disk, beyond what fits a cache of a few MiB."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # a file of its own that nobody else sees
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, number INTEGER, done INTEGER) WITHOUT ROWID")

    def add(self, line: Line) -> None:
        """Take the id of a line.

        Raises:
            InvalidInputError: another line has it.
        """
        values = (line.key, line.number)
        if not self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, 0)", values).rowcount:
            (other,) = self._database.execute("SELECT number FROM ids WHERE id = ?", (line.key,)).fetchone()
            raise InvalidInputError(
                f"line {line.number} has the id {line.key}, as line {other} has; results are told by their ids, so "
                "give each its own (a line without one has its number)"
            )

    def finish(self, key: str) -> bool:
        """Note that an id is done; False if it was already, or there is none of that name."""
        return bool(self._database.execute("UPDATE ids SET done = 1 WHERE id = ? AND done = 0", (key,)).rowcount)

    def is_done(self, key: str) -> bool:
        """Whether it is."""
        found = self._database.execute("SELECT done FROM ids WHERE id = ?", (key,)).fetchone()
        return found is not None and bool(found[0])

    def close(self) -> None:
        """Remove the file."""
        self._database.close()


@dataclass(frozen=True)
class Survey:
    """What a first reading found.

    Attributes:
        index: of all lines.
        count: of lines.
        longest: tokens of the longest prompt; 0 without any.
    """

    index: Index
    count: int
    longest: int


def survey(path: Path, read: Read, *, skips_errors: bool) -> Survey:
    """Read all of it once, before any work.

    Raises:
        InvalidInputError: a line is bad, and bad ones are not to be skipped; two have the same id; or there is none.
    """
    index, count, longest = Index(), 0, 0
    for line in read_lines(path, read):
        if line.error and not skips_errors:
            raise InvalidInputError(
                f"--input {path}, {line.error}\nMend it, or pass --skip-errors: its result is then the error"
            )
        index.add(line)
        count, longest = count + 1, max(longest, len(line.tokens))
    if not count:
        raise InvalidInputError(f"--input {path} holds no prompt; write one JSON value a line")
    return Survey(index, count, longest)
