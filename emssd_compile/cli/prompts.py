"""Prompts given on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emssd_compile.errors import InvalidInputError, OptionError

STDIN = Path("-")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what is to be continued; empty for a chat.
        messages: of a chat, as chat templates take them; empty for a text.
        entry: the object that it came in, with whatever else was in it.
    """

    text: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)

    def as_chat(self) -> Prompt:
        """The text as what a user says."""
        messages = self.messages or [{"role": "user", "content": self.text}]
        return Prompt("", messages, self.entry)


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[Prompt]:
    """The prompts given as texts, then those of the files in order.

    A `.json` file is a list of prompts; a `.jsonl` file, and standard input for `-`, has one a line. Each is a string
    or an object with `"text"` or `"messages"`; any other file is one prompt.

    Raises:
        OptionError: no prompt was given, or a file cannot be read.
        InvalidInputError: a prompt is empty or no text; says which.
    """
    prompts = [Prompt(text, entry={"text": text}) for text in texts]
    for file in files:
        prompts += _read_file(file)
    if not prompts:
        raise OptionError("no prompt: pass --prompt TEXT or --prompt-file FILE")
    for index, prompt in enumerate(prompts):
        if not prompt.text and not prompt.messages:
            raise InvalidInputError(f"prompt {index + 1} of {len(prompts)} is empty; give it at least one word")
        try:
            prompt.text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"prompt {index + 1} of {len(prompts)} is no text: {error}") from error
    return prompts


def _read_file(file: Path) -> Iterable[Prompt]:
    try:
        content = sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            entries = json.loads(content)
        elif file.suffix == ".jsonl" or file == STDIN:
            entries = [_parse(line, n) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
        else:
            return [Prompt(content, entry={"text": content})]
    except (OSError, ValueError) as error:
        raise OptionError(f"--prompt-file {file} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise InvalidInputError(f'{file} holds no list; write ["a prompt", ...] or [{{"text": "a prompt"}}, ...]')
    return [_prompt(entry, f"{file}, entry {index}") for index, entry in enumerate(entries)]


def _parse(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _prompt(entry: object, where: str) -> Prompt:
    if isinstance(entry, str):
        return Prompt(entry, entry={"text": entry})
    if isinstance(entry, dict) and isinstance(text := entry.get("text"), str):
        return Prompt(text, entry=entry)
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InvalidInputError(
            f'{where}: neither a string nor an object with a string "text" or with "messages", a list of objects'
        )
    assert isinstance(entry, dict)
    return Prompt(messages=messages, entry=entry)
