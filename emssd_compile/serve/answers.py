"""The JSON of answers, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from emssd_compile.serve.choice import Choice, Piece
from emssd_compile.serve.logprobs import TokenLogprobs, as_chat, as_completion


class Form(Protocol):
    """What the answers of an endpoint look like.

    Attributes:
        prefix: how their ids begin.
        kind, chunk_kind: what a whole answer is called, and a part of one.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def whole(self, text: str, tokens: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        """One choice of a whole answer; `tokens` are None if nobody asked."""

    def delta(self, piece: Piece, is_first: bool, has_logprobs: bool) -> dict[str, Any]:
        """One choice of a chunk."""


class CompletionForm:
    """Of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def whole(self, text: str, tokens: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        """Text, and log-probabilities if there are any."""
        return {"text": text, "logprobs": None if tokens is None else as_completion(tokens)}

    def delta(self, piece: Piece, is_first: bool, has_logprobs: bool) -> dict[str, Any]:
        """The same, of a piece."""
        return self.whole(piece.text, piece.tokens if has_logprobs else None)


class ChatForm:
    """Of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, text: str, tokens: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        """A message, and log-probabilities if there are any."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": None if tokens is None else as_chat(tokens)}

    def delta(self, piece: Piece, is_first: bool, has_logprobs: bool) -> dict[str, Any]:
        """What is new of the message."""
        role = {"role": "assistant"} if is_first else {}
        logprobs = as_chat(piece.tokens) if has_logprobs else None
        return {"delta": role | {"content": piece.text}, "logprobs": logprobs}


class Answer:
    """Makes the JSON of one request's answer.

    Args:
        form: of the endpoint.
        model: its name.
        has_logprobs: whether log-probabilities are shown.
        includes_usage: whether chunks say that the usage comes last.
    """

    def __init__(self, form: Form, model: str, *, has_logprobs: bool, includes_usage: bool = False) -> None:
        self._form, self._has_logprobs = form, has_logprobs
        self._head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._usage: dict[str, Any] = {"usage": None} if includes_usage else {}
        self._begun: set[int] = set()

    def whole(self, texts: Sequence[tuple[Choice, Sequence[Piece]]], n: int) -> dict[str, Any]:
        """All of it: each choice with its pieces."""
        choices = []
        for choice, pieces in texts:
            text = "".join(piece.text for piece in pieces)
            tokens = [token for piece in pieces for token in piece.tokens] if self._has_logprobs else None
            shown = self._form.whole(text, tokens)
            choices.append({"index": choice.index, "finish_reason": choice.finish_reason, **shown})
        used = usage([choice for choice, _ in texts], n)
        return {**self._head, "object": self._form.kind, "choices": choices, "usage": used}

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """A piece of a choice."""
        is_first = choice.index not in self._begun
        self._begun.add(choice.index)
        shown = self._form.delta(piece, is_first, self._has_logprobs)
        choices = [{"index": choice.index, "finish_reason": piece.finish_reason, **shown}]
        return {**self._head, "object": self._form.chunk_kind, "choices": choices, **self._usage}

    def last(self, choices: Sequence[Choice], n: int) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head, "object": self._form.chunk_kind, "choices": [], "usage": usage(choices, n)}


def usage(choices: Sequence[Choice], n: int) -> dict[str, int]:
    """Tokens of an answer with n texts for each prompt; a prompt counts once."""
    prompt = sum(choice.num_prompt_tokens for choice in choices[::n])
    new = sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
