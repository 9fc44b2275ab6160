"""By what blocks of a pool are found: what they hold, and all that comes before it."""

from __future__ import annotations

import hashlib

from torch import Tensor

_KEY_BYTES = 32  # no two texts have ever been found to have one key


class BlockKeys:
    """The keys of a text's full blocks, each made of all tokens up to the block's end, as it grows.

    Args:
        scope: keys of different scopes are never equal.
        block_size: P, tokens of a block.
        lookahead: tokens behind a block that what it holds depends on, too.

    Attributes:
        keys: of the first blocks; those whose tokens, and what is looked ahead to, have been told.
        awaited: the one that there was no block of when its blocks were looked for last; empty for none.
    """

    def __init__(self, scope: bytes, block_size: int, lookahead: int) -> None:
        self._block_size, self._lookahead = block_size, lookahead
        self._chain = _digest(scope)
        self.keys: list[bytes] = []
        self.awaited = b""

    def extend(self, text: Tensor) -> None:
        """Go on with the same text, which is longer now: int64 `[S]`, on the CPU."""
        while (end := (len(self.keys) + 1) * self._block_size) + self._lookahead <= len(text):
            self._chain = _digest(self._chain, text[end - self._block_size : end])
            self.keys.append(
                _digest(self._chain, text[end : end + self._lookahead]) if self._lookahead else self._chain
            )


def _digest(before: bytes, *tokens: Tensor) -> bytes:
    return hashlib.blake2b(
        before + b"".join(each.numpy().tobytes() for each in tokens), digest_size=_KEY_BYTES
    ).digest()
