"""Log-probabilities of tokens, as the two kinds of answers show them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emssd_compile.stream import Stream

_LEAST = -9999.0  # also for infinity and NaN, which JSON has not


@dataclass(frozen=True)
class TokenLogprobs:
    """What is told of a token.

    Attributes:
        token: its text.
        logprob: its own.
        top: the likeliest tokens in its place, as many as were asked for.
        offset: characters of the answer before it.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


class LogprobReader:
    """Reads what a stream is told of its tokens.

    Args:
        stream: a request with `logprobs`, and with `top_logprobs` if `top` is not 0.
        top: how many of the likeliest tokens are shown.
        tokenizer: of transformers.
    """

    def __init__(self, stream: Stream, top: int, tokenizer: Any) -> None:
        self._stream, self._top, self._tokenizer = stream, top, tokenizer
        self._lines: Iterator[tuple[Tensor, ...]] | None = None

    def read(self, token: int, offset: int) -> TokenLogprobs:
        """Of the token that the stream gave last."""
        if self._lines is None:  # there is nothing before the first token
            names = ("logprobs", "top_logprobs", "top_logprob_ids") if self._top else ("logprobs",)
            self._lines = zip(*map(self._stream.told, names), strict=False)
        logprob, *likeliest = next(self._lines)
        top = zip(*(line[: self._top].tolist() for line in likeliest), strict=True) if likeliest else ()
        return TokenLogprobs(
            token_text(self._tokenizer, token),
            _number(float(logprob)),
            tuple((token_text(self._tokenizer, each), _number(value)) for value, each in top),
            offset,
        )


def _number(logprob: float) -> float:
    return max(logprob, _LEAST) if math.isfinite(logprob) else _LEAST


def token_text(tokenizer: Any, token: int) -> str:
    """What a token is within a text: its second appearance, since some tokenizers drop a text's first space."""
    twice: str = tokenizer.decode([token, token])
    return twice[len(tokenizer.decode([token])) :]


def as_completion(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of `/v1/completions`. The token itself is among the likeliest in any case."""
    return {
        "tokens": [each.token for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [{each.token: each.logprob} | dict(reversed(each.top)) for each in tokens],
        "text_offset": [each.offset for each in tokens],
    }


def as_chat(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of `/v1/chat/completions`."""
    content = [
        _shown(each.token, each.logprob) | {"top_logprobs": [_shown(*one) for one in each.top]} for each in tokens
    ]
    return {"content": content, "refusal": None}


def _shown(token: str, logprob: float) -> dict[str, Any]:
    """A token of a part of a character has no bytes of its own that we know."""
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else [*token.encode()]}
