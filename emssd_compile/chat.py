"""Chats as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emssd_compile.errors import InvalidInputError, OptionError


def check_template(tokenizer: Any, instead: str) -> None:
    """Raises OptionError if the model's tokenizer has no chat template; `instead` says what to do then."""
    if tokenizer.chat_template is None:
        raise OptionError(f"the model has no chat template; {instead}")


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a chat, up to where the answer begins.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: each with a "role", "content" and whatever else its template takes.

    Raises:
        InvalidInputError: the template refuses them.
    """
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # templates are programs, and raise what they like
        raise InvalidInputError(f"messages: the model's chat template refuses them: {error}") from error
    return [*found["input_ids"]]
