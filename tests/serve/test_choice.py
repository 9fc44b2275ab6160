"""How texts end, whatever ended their tokens."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from emssd_compile.errors import GrammarError
from emssd_compile.serve.choice import Choice
from emssd_compile.serve.errors import ApiError
from emssd_compile.text import Detokenizer, StopTexts
from tests.serve.servers import ids_of, tokenizer


class _Stream:
    """Gives tokens, and ends."""

    def __init__(self, tokens: Sequence[int], finish_reason: str, error: Exception | None = None) -> None:
        self.tokens, self.finish_reason, self.error, self.is_cancelled = tokens, finish_reason, error, False

    async def __aiter__(self) -> AsyncIterator[int]:
        for token in self.tokens:
            yield token
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.is_cancelled = True


def read(stream: Any, *stops: str, eos: int = 0) -> tuple[list[str], Choice]:
    """The pieces of its text."""
    choice = Choice(0, stream, 1, Detokenizer(tokenizer(), []), StopTexts(stops), {eos})

    async def pieces() -> list[str]:
        return [piece.text async for piece in choice.pieces()]

    return asyncio.run(pieces()), choice


@pytest.mark.parametrize(("ended", "reason"), [("length", "length"), ("deadline", "length"), ("eos", "stop")])
def test_what_was_held_back_comes_in_the_last_piece(ended, reason):
    first, *_ = ids_of("🙂")
    pieces, choice = read(_Stream([*ids_of("st"), first], ended), "stop")
    assert ("".join(pieces), choice.finish_reason) == ("st\ufffd", reason)
    assert choice.num_tokens == len(ids_of("st")) + 1


def test_an_eos_is_no_text_and_counts():
    (end,) = ids_of("x")  # as any token may be
    pieces, choice = read(_Stream([*ids_of("ab"), end], "eos"), eos=end)
    assert ("".join(pieces), choice.num_tokens) == ("ab", len(ids_of("ab")) + 1)


def test_a_stop_text_ends_the_tokens_too():
    stream = _Stream([*ids_of("ab"), *ids_of("c"), *ids_of("d")], "length")
    pieces, choice = read(stream, "c")
    assert ("".join(pieces), choice.finish_reason) == ("ab", "stop")
    assert stream.is_cancelled
    assert choice.num_tokens == len(ids_of("ab")) + 1


@pytest.mark.parametrize(
    ("stream", "status"),
    [
        (_Stream([], "deadline"), 503),
        (_Stream(ids_of("ab"), "cancelled"), 503),
        (_Stream(ids_of("ab"), "error", GrammarError("nothing may follow")), 400),
        (_Stream(ids_of("ab"), "error", ZeroDivisionError("secret")), 500),
    ],
)
def test_what_is_no_end_of_a_text_is_an_error(stream, status):
    choice = Choice(0, stream, 1, Detokenizer(tokenizer(), []), StopTexts([]), {0})

    async def drain() -> None:
        async for _ in choice.pieces():
            pass

    with pytest.raises(ApiError) as failed:
        asyncio.run(drain())
    assert (failed.value.status_code, choice.finish_reason) == (status, "error")


def test_a_text_that_nobody_reads_is_cancelled():
    stream: Any = _Stream(ids_of("ab"), "length")
    choice = Choice(0, stream, 1, Detokenizer(tokenizer(), []), StopTexts([]), {0})
    choice.abandon()
    assert (stream.is_cancelled, choice.finish_reason) == (True, "abort")
