"""Chats are tokens where an answer begins, and what a template refuses is the user's to mend."""

import pytest

from emssd_compile.chat import chat_tokens, check_template
from emssd_compile.errors import InvalidInputError, OptionError


class _Tokenizer:
    """Refuses empty messages."""

    def __init__(self, chat_template: str | None = "a template") -> None:
        self.chat_template = chat_template

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, return_dict: bool
    ) -> dict[str, list[int]]:
        assert add_generation_prompt
        assert return_dict
        if not all(message["content"] for message in messages):
            raise ZeroDivisionError("empty")
        return {"input_ids": [len(message["content"]) for message in messages]}


def test_a_chat_is_what_the_template_makes_of_it():
    assert chat_tokens(_Tokenizer(), [{"role": "user", "content": "abc"}]) == [3]


def test_what_a_template_raises_is_said_of_the_messages():
    with pytest.raises(InvalidInputError, match="messages: the model's chat template refuses them: empty"):
        chat_tokens(_Tokenizer(), [{"role": "user", "content": ""}])


def test_without_a_template_it_is_said_what_to_do():
    check_template(_Tokenizer(), "leave --chat out")
    with pytest.raises(OptionError, match="the model has no chat template; leave --chat out"):
        check_template(_Tokenizer(None), "leave --chat out")
