"""Matchers of any library: what reads a text token by token, and says by a mask what may follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from emssd_compile.errors import OptionError
from emssd_compile.numeric import shown


class Matcher(Protocol):
    """Reads one text. A mask is int32 `[ceil(V / 32)]`: bit t % 32 of word t // 32 says whether token t may follow."""

    def accept_token(self, token_id: int, /) -> bool:
        """Read a token. False if it may not follow: then nothing is read."""

    def rollback(self, num_tokens: int, /) -> object:
        """Take back the last tokens that were read."""

    def fill_next_token_bitmask(self, bitmask: torch.Tensor, index: int, /) -> object:
        """Write all of the mask into `bitmask[index]`; an end is allowed where the text may end."""


_METHODS = ("accept_token", "rollback", "fill_next_token_bitmask")


class MaskMatcher:
    """A `Matcher`, called as llguidance's are.

    Args:
        own: has read nothing.
        vocab_size: V.
        ends: the ids that it allows where a text may end.

    Attributes:
        mask: int32 `[ceil(V / 32)]`, what may follow; filled when it is asked whether the text may end.

    Raises:
        OptionError: it lacks a method.
    """

    def __init__(self, own: Matcher, vocab_size: int, ends: Sequence[int]) -> None:
        missing = [name for name in _METHODS if not callable(getattr(own, name, None))]
        if missing:
            raise OptionError(
                f"matching: start() gave {shown(own)}, which has no {', '.join(missing)}; see "
                "emssd_compile.matcher.Matcher"
            )
        self._own, self._ends = own, ends
        self._lines = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32)
        self.mask: Any = self._lines.numpy()[0]

    def try_consume_tokens(self, tokens: Sequence[int]) -> int:
        """Read tokens as long as they may follow; returns how many did."""
        return next((count for count, token in enumerate(tokens) if not self._own.accept_token(token)), len(tokens))

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""
        self._own.rollback(count)

    def is_accepting(self) -> bool:
        """Whether the text may end."""
        self._own.fill_next_token_bitmask(self._lines, 0)
        return any(self.mask[token // 32] >> (token % 32) & 1 for token in self._ends)

    def is_error(self) -> bool:
        """It goes back from wherever it stands."""
        return False

    def compute_bitmask(self) -> None:
        """It has nothing to say on why nothing may follow."""

    def stop_reason(self) -> str:
        """As above."""
        return "its mask is empty"
