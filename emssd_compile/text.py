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

    A prompt may end within a character, too. If it is completed, all of it is in the first piece, which then takes the
    place of the U+FFFD that the prompt's text ends with.

    Args:
        tokenizer: of transformers.
        prompt: token ids.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._num_replaced = 0
        self._read, self._given = self._context(prompt)  # tokens whose text was given, and that text
        self._new: list[int] = []

    def push(self, *tokens: int) -> str:
        """The text that more tokens complete; often empty."""
        self._new += tokens
        return self._take(may_be_incomplete=False)

    def end(self) -> str:
        """What is left, though no character."""
        return self._take(may_be_incomplete=True) if self._new else ""

    def prompt_before(self, text: str) -> str:
        """The prompt's text, to be put before the first piece once there is that one."""
        return text.removesuffix(_INCOMPLETE * self._num_replaced)

    def _take(self, *, may_be_incomplete: bool) -> str:
        whole = self._decoded(self._read + self._new)
        if whole.endswith(_INCOMPLETE) and not may_be_incomplete:
            return ""
        start = len(self._given.rstrip(_INCOMPLETE))
        while start < len(self._given) and whole[start : start + 1] == _INCOMPLETE:
            start += 1  # this one stays
        self._num_replaced += len(self._given) - start
        alone = self._decoded(self._new)
        if alone.startswith(_INCOMPLETE):  # it takes those before to make sense of it
            self._read, self._given = self._read + self._new, whole
        else:
            self._read, self._given = self._new, alone
        self._new = []
        return whole[start:]

    def _context(self, prompt: Sequence[int]) -> tuple[list[int], str]:
        """The end of the prompt, from between two characters, and its text."""
        count = _CONTEXT
        while (text := self._decoded([*prompt[-count:]])).startswith(_INCOMPLETE) and count < len(prompt):
            count *= 2
        return [*prompt[-count:]], text

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def text_behind(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens behind those of a prompt."""
    detokenizer = Detokenizer(tokenizer, prompt)
    return detokenizer.push(*new) + detokenizer.end()


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
