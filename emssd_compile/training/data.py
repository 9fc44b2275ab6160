"""Texts as windows of tokens, and in which order they are learnt from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emssd_compile.errors import InvalidInputError, OptionError
from emssd_compile.numeric import shown
from emssd_compile.standard_json import read_json


@dataclass(frozen=True)
class Windows:
    """Pieces of text of the same length.

    Attributes:
        tokens: int64 `[N, S]`.
        counts: bool `[N, S]`, whether a token is to be learnt; those of prompts are only read.
    """

    tokens: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Tensor | slice) -> Windows:
        return Windows(self.tokens[index], self.counts[index])

    @classmethod
    def cut(cls, tokens: Tensor, window: int, counts: Tensor | None = None) -> Windows:
        """Those of a stream `[T]`, side by side; what is left at its end is dropped.

        Raises:
            InvalidInputError: the stream is shorter than a window.
        """
        number = len(tokens) // window
        if number == 0:
            raise InvalidInputError(
                f"a text of {len(tokens)} tokens has no window of {window}; pass more text, or a smaller window"
            )
        counts = torch.ones_like(tokens, dtype=torch.bool) if counts is None else counts
        return cls(*(each[: number * window].view(number, window) for each in (tokens, counts)))

    def split(self, share: float, seed: int) -> tuple[Windows, Windows]:
        """Those to learn from, and a share of them, chosen by the seed, that is held out: one at least.

        Raises:
            InvalidInputError: there is one window only.
        """
        if len(self) < 2:
            raise InvalidInputError(
                "the text has one window only, so none can be held out; pass more text, a smaller window, or files to "
                "hold out"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held_out = min(len(self) - 1, max(1, round(share * len(self))))
        return self[order[held_out:].sort().values], self[order[:held_out].sort().values]

    def digest(self) -> str:
        """A hash of all tokens."""
        held = b"".join(each.contiguous().numpy().tobytes() for each in (self.tokens, self.counts))
        return hashlib.sha256(held).hexdigest()


class Order:
    """An endless sequence of windows: all of them in a new order, again and again.

    Args:
        number: of windows, N.
        seed: of the orders.
    """

    def __init__(self, number: int, seed: int) -> None:
        self._number, self._seed = number, seed
        self._drawn = (-1, torch.empty(0))

    def take(self, first: int, count: int) -> Tensor:
        """Which windows the entries `first`, `first + 1`, ... of the sequence are: int64 `[count]`."""
        places = (divmod(place, self._number) for place in range(first, first + count))
        return torch.tensor([int(self._epoch(epoch)[index]) for epoch, index in places])

    def _epoch(self, epoch: int) -> Tensor:
        if self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(mixed(self._seed, epoch))
            self._drawn = (epoch, torch.randperm(self._number, generator=generator))
        return self._drawn[1]


def mixed(*numbers: int) -> int:
    """A seed made of several numbers."""
    digest = hashlib.blake2b(json.dumps(numbers).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def read_documents(files: Sequence[Path]) -> list[str]:
    """The texts in files: each line's `text` of a `.jsonl` file, other files as a whole; empty ones are left out.

    Raises:
        OptionError: a file cannot be read.
        InvalidInputError: a file holds no text, a line no object with a `text`, or all of them nothing.
    """
    documents = [text for file in files for text in _read(file) if text]
    if not documents:
        raise InvalidInputError(f"no text in {', '.join(map(str, files)) or 'no files'}; pass files that hold some")
    return documents


def _read(file: Path) -> Iterator[str]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise OptionError(f"{file} cannot be read: {error.strerror or error}; pass text files") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{file} is no text: byte {error.start} is not UTF-8; pass text files") from error
    if (place := content.find(b"\0")) >= 0:
        raise InvalidInputError(f"{file} is no text: byte {place} is 0; pass text files")
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _text_of(line, f"{file}, line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        entry = read_json(line)
    except ValueError as error:
        raise InvalidInputError(f"{where} is no JSON: {error}") from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise InvalidInputError(f'{where}: {shown(line)} is no object with a string "text"')
    return text


def encode(documents: Sequence[str], tokenizer: Any, limit: int | None) -> Tensor:
    """The texts as one stream of tokens, int64 `[T]`, with the tokenizer's end of text behind each, if it has one.

    Args:
        documents: the texts.
        tokenizer: of the target, as in transformers.
        limit: most tokens; those behind are dropped.
    """
    end = [] if getattr(tokenizer, "eos_token_id", None) is None else [tokenizer.eos_token_id]
    parts: list[Tensor] = []
    total = 0
    for text in documents:
        parts.append(torch.tensor([*tokenizer(text, verbose=False)["input_ids"], *end], dtype=torch.int64))
        total += len(parts[-1])
        if limit is not None and total >= limit:
            break
    return torch.cat(parts)[:limit]


def check_ids(tokens: Tensor, vocabulary: int) -> None:
    """Raises InvalidInputError if an id is none of a vocabulary of so many."""
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise InvalidInputError(
            f"the tokenizer makes the id {int(tokens.max())}, and the model has {vocabulary}; pass the tokenizer that "
            "was made for the model"
        )


def check_disjoint(data: Sequence[str], held_out: Sequence[str]) -> None:
    """Raises InvalidInputError if a text that is held out is one that is learnt from, too."""
    learnt = {hashlib.sha256(text.encode()).digest() for text in data}
    for text in held_out:
        if hashlib.sha256(text.encode()).digest() in learnt:
            raise InvalidInputError(
                f"a text that is held out is also one to learn from: {shown(text)}; take it out of one of them"
            )
