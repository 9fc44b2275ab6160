"""One text of an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from emssd_compile.serve.errors import RETRY, ApiError
from emssd_compile.serve.logprobs import LogprobReader, TokenLogprobs
from emssd_compile.stream import Stream
from emssd_compile.text import Detokenizer, StopTexts

Reason = Literal["stop", "length", "abort", "error"]
"""Why a text ended, by vLLM's names: an EOS or stop text, a limit of tokens or time, a client that left, an error."""


@dataclass(frozen=True)
class Piece:
    """What is new of a text.

    Attributes:
        text: whole characters; empty in a last piece that has nothing but the reason.
        tokens: what is told of its tokens, if that was asked for; the last piece has all that are left.
        finish_reason: of the last piece.
    """

    text: str
    tokens: Sequence[TokenLogprobs] = ()
    finish_reason: Reason | None = None


class Choice:
    """Reads the tokens of a request as text.

    Args:
        index: its number in the answer.
        stream: what decodes it.
        num_prompt_tokens: of its prompt.
        detokenizer: makes text of its tokens.
        stops: the texts that end it.
        eos: tokens that end it, which are no text.
        logprobs: tells of its tokens; None if nobody asked.
        echo: the prompt's text, if it is to be shown before the new one.

    Attributes:
        num_tokens: those that were read, up to the one that ends it.
        finish_reason: None before its end.
    """

    def __init__(
        self,
        index: int,
        stream: Stream,
        num_prompt_tokens: int,
        detokenizer: Detokenizer,
        stops: StopTexts,
        eos: Collection[int],
        logprobs: LogprobReader | None = None,
        echo: str = "",
    ) -> None:
        self.index, self.stream, self.num_prompt_tokens = index, stream, num_prompt_tokens
        self.num_tokens = 0
        self.finish_reason: Reason | None = None
        self._detokenizer, self._stops, self._eos, self._logprobs = detokenizer, stops, eos, logprobs
        self._echo = echo

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of the text; the last one has the reason.

        Raises:
            ApiError: it ended in another way than texts end.
        """
        told: list[TokenLogprobs] = []
        length = 0
        try:
            async for token in self.stream:
                self.num_tokens += 1
                if self._logprobs is not None:
                    told.append(self._logprobs.read(token, length))
                new = "" if token in self._eos else self._detokenizer.push(token)
                length += len(new)
                text = self._stops.push(new)
                if self._stops.found:
                    self.stream.cancel()
                    self.finish_reason = "stop"
                    yield Piece(self._echoed(text), told, "stop")
                    return
                if text:
                    yield Piece(self._echoed(text), told)
                    told = []
            rest = self._stops.push(self._detokenizer.end()) + self._stops.end()
            self.finish_reason = "stop" if self._stops.found else self._reason()
            yield Piece(self._echoed(rest), told, self.finish_reason)
        except Exception as error:
            self.finish_reason = self.finish_reason or "error"
            raise ApiError.of(error) from error

    def abandon(self) -> None:
        """Nobody reads it any more; without effect on one that has ended."""
        self.stream.cancel()
        self.finish_reason = self.finish_reason or "abort"

    def _echoed(self, text: str) -> str:
        """A piece, and before the first one the prompt."""
        echo, self._echo = self._echo, ""
        return self._detokenizer.prompt_before(echo) + text

    def _reason(self) -> Reason:
        ended = self.stream.finish_reason
        if ended == "cancelled":
            raise ApiError(503, "the request was ended before it was done: the server is shutting down", code="closed")
        if ended == "deadline" and not self.num_tokens:
            raise ApiError(503, "the server's deadline was over before a token came", code="deadline", headers=RETRY)
        return "stop" if ended == "eos" else "length"
