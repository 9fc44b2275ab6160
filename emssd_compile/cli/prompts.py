"""Prompts given on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from emssd_compile.errors import InvalidInputError, OptionError


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The prompts given as texts, then those of the files in order.

    A `.json` file is a list of prompts, a `.jsonl` file has one a line, each a string or an object with `"text"`; any
    other file is one prompt.

    Raises:
        OptionError: no prompt was given, or a file cannot be read.
        InvalidInputError: a prompt is empty or no text; says which.
    """
    prompts = list(texts)
    for file in files:
        prompts += _read_file(file)
    if not prompts:
        raise OptionError("no prompt: pass --prompt TEXT or --prompt-file FILE")
    if "" in prompts:
        raise InvalidInputError(f"prompt {prompts.index('') + 1} of {len(prompts)} is empty; give it at least one word")
    return prompts


def _read_file(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            entries = json.loads(content)
        elif file.suffix == ".jsonl":
            entries = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            return [content]
    except (OSError, ValueError) as error:
        raise OptionError(f"--prompt-file {file} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise InvalidInputError(f'{file} holds no list; write ["a prompt", ...] or [{{"text": "a prompt"}}, ...]')
    prompts: list[str] = []
    for index, entry in enumerate(entries):
        prompt = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(prompt, str):
            raise InvalidInputError(f'{file}, entry {index}: neither a string nor an object with a string "text"')
        prompts.append(prompt)
    return prompts
