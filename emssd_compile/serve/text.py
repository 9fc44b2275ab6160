"""Text of tokens as they come: whole characters, and nothing that may be part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character, or not one yet
_CONTEXT = 6  # tokens of the prompt that the first piece is decoded with: some tokenizers drop a text's first space


class Detokenizer:
    """Decodes token by token. The pieces make up the text that follows that of the prompt.

    Each piece is what a token adds to the text of those just before it, since a tokenizer may decode a token otherwise
    at the beginning of a text. A piece that ends within a character waits for the rest of it.

    Args:
        tokenizer: of transformers.
        prompt: token ids.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._read = [*prompt[-_CONTEXT:]]  # tokens whose text was given
        self._new: list[int] = []
        self._start = len(self._decoded(self._read).rstrip(_INCOMPLETE))  # the prompt may end within a character

    def push(self, token: int) -> str:
        """The text that another token completes; often empty."""
        self._new.append(token)
        return self._take(may_be_incomplete=False)

    def end(self) -> str:
        """What is left, though no character."""
        return self._take(may_be_incomplete=True) if self._new else ""

    def _take(self, *, may_be_incomplete: bool) -> str:
        whole = self._decoded(self._read + self._new)
        if whole.endswith(_INCOMPLETE) and not may_be_incomplete:
            return ""
        piece = whole[self._start :]
        self._read, self._new = self._new, []
        self._start = len(self._decoded(self._read))
        return piece

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class StopTexts:
    """Lets text through up to the first stop text. What may be the beginning of one waits.

    The first is the one that ends first, as if the text came character by character; of several that end there, the
    longest. So it does not depend on how tokens cut the text.

    Attributes:
        found: whether there was one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = tuple(stops), "", False

    def push(self, text: str) -> str:
        """The text that is certain now; nothing behind a stop text."""
        if self.found:
            return ""
        held = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0]
        self.found = bool(found)
        certain = min(found)[1] if found else len(held) - self._begun(held)
        self._held = held[certain:]
        return held[:certain]

    def end(self) -> str:
        """What waited in vain."""
        return "" if self.found else self._held

    def _begun(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        lengths = ((stop, n) for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)))
        return max((n for stop, n in lengths if text.endswith(stop[:n])), default=0)
