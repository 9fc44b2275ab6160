"""Prompts given on the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emssd_compile.chat import chat_tokens, check_template
from emssd_compile.errors import InvalidInputError, OptionError
from emssd_compile.standard_json import read_json
from emssd_compile.text import text_behind

STDIN = Path("-")
NO_CHAT = "leave --chat out, and write prompts as texts"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what is to be continued; empty for the two others.
        messages: of a chat, as chat templates take them.
        ids: tokens.
        entry: the object that it came in, with whatever else was in it.
    """

    text: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)

    def as_chat(self) -> Prompt:
        """A text as what a user says."""
        return replace(self, text="", messages=[{"role": "user", "content": self.text}]) if self.text else self

    def tokens(self, tokenizer: Any) -> list[int]:
        """Its ids; those of a chat end where the answer begins. Raises InvalidInputError if there are none."""
        if self.messages:
            check_template(tokenizer, NO_CHAT)
            return chat_tokens(tokenizer, self.messages)
        found = self.ids or tokenizer(self.text)["input_ids"]
        if not found:
            raise InvalidInputError("the tokenizer makes no token of it; give it at least one word")
        return list(found)

    def completed(self, tokens: Sequence[int], new: Sequence[int], tokenizer: Any) -> dict[str, Any]:
        """The object that it came in, with what follows its tokens: as ids, too, if it was ids."""
        found = {"completion": text_behind(tokenizer, tokens, new), "num_new_tokens": len(new)}
        return self.entry | found | ({"completion_ids": [*new]} if self.ids else {})


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[Prompt]:
    """The prompts given as texts, then those of the files in order.

    A `.json` file is a list of prompts; a `.jsonl` file, and standard input for `-`, has one a line. Each is as
    `parse_prompt` takes it; any other file is one prompt.

    Raises:
        OptionError: no prompt was given, or a file cannot be read.
        InvalidInputError: a prompt is empty or no text; says which.
    """
    if [*files].count(STDIN) > 1:
        raise OptionError(f"--prompt-file {STDIN} is given twice, and standard input can be read once; leave one out")
    prompts = [Prompt(text, entry={"text": text}) for text in texts]
    for file in files:
        prompts += _read_file(file)
    if not prompts:
        raise OptionError("no prompt: pass --prompt TEXT or --prompt-file FILE")
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, f"prompt {index + 1} of {len(prompts)}")
    return prompts


def check_prompt(prompt: Prompt, where: str) -> None:
    """Raises InvalidInputError if it is empty, or no text that could be encoded."""
    if not (prompt.text or prompt.messages or prompt.ids):
        raise InvalidInputError(f"{where} is empty; give it at least one word")
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{where} is no text: {error}") from error


def _read_file(file: Path) -> Iterable[Prompt]:
    try:
        content = sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            entries = read_json(content)
        elif file.suffix == ".jsonl" or file == STDIN:
            entries = [_parse(line, n) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
        else:
            return [Prompt(content, entry={"text": content})]
    except (OSError, ValueError) as error:
        raise OptionError(f"--prompt-file {file} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise InvalidInputError(f'{file} holds no list; write ["a prompt", ...] or [{{"text": "a prompt"}}, ...]')
    return [parse_prompt(entry, f"{file}, entry {index}") for index, entry in enumerate(entries)]


def _parse(line: str, number: int) -> object:
    try:
        return read_json(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def parse_prompt(entry: object, where: str) -> Prompt:
    """A prompt of what JSON has for it.

    That is a string, a list of token ids, or an object with a string `"text"`, with `"messages"`, a list of objects, or
    with `"input_ids"`, a list of token ids.

    Raises:
        InvalidInputError: it is none of these; begins with `where`.
    """
    if isinstance(entry, str):
        entry = {"text": entry}
    elif isinstance(entry, list):
        entry = {"input_ids": entry}
    if isinstance(entry, dict):
        text, messages, ids = (entry.get(name) for name in ("text", "messages", "input_ids"))
        if isinstance(text, str):
            return Prompt(text, entry=entry)
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return Prompt(messages=messages, entry=entry)
        if isinstance(ids, list) and all(type(token) is int for token in ids):
            return Prompt(ids=ids, entry=entry)
    raise InvalidInputError(
        f'{where}: neither a string nor an object with a string "text", with "messages", a list of objects, or with '
        '"input_ids", a list of token ids'
    )
