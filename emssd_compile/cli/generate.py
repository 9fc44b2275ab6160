"""`generate`: continue prompts with a saved model."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from emssd_compile.cli.decoding import add_decoding, sampling, stats_table
from emssd_compile.cli.models import (
    PROGRAM,
    add_command,
    add_memory,
    add_model,
    add_sizes,
    check_not_chosen,
    is_artifact,
    load_tokenizer,
    open_decoder,
)
from emssd_compile.cli.prompts import Prompt, read_prompts
from emssd_compile.errors import OptionError

EXAMPLES = f"""
examples:
  {PROGRAM} generate --model llama/ --prompt "def fibonacci(n):"
      drafts by prompt lookup: copies what followed the newest words earlier in the same text
  {PROGRAM} generate --model llama/ --drafter small-llama/ --num-draft-tokens 5 --prompt-file prompts.json
      a smaller model of the same vocabulary drafts; all prompts are decoded together, none is padded
  {PROGRAM} generate --model llama/ --drafter none --backend eager --prompt-file essay.txt
      no drafts and no compilation: slower, and the same text
  {PROGRAM} generate --model llama.onnx/ --prompt "def fibonacci(n):"
      an artifact with its tokenizer, as `export` writes one; what was chosen when it was written is no option here
  {PROGRAM} generate --model llama/ --chat --temperature 0.7 --top-p 0.9 --stop "Q:" --stream --prompt "What is jazz?"
      a chat's answer, drawn, word by word as it comes
  {PROGRAM} generate --model llama/ --prompt-file - --format jsonl
      prompts from standard input, one JSON value a line; each comes back with "completion" added

prompt files:
  *.json     a list of prompts, each a string, a list of token ids, or an object with "text", with "messages" for a
             chat, or with "input_ids"
  *.jsonl    one such prompt a line; - is standard input, read in the same way
  others     the whole file is one prompt

The text goes to standard output, everything else to standard error. With --format jsonl an object a line does: what the
prompt came in, with "completion" and "num_new_tokens" added, and for token ids "completion_ids".
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "generate", "continue prompts", EXAMPLES)
    add_model(parser)
    add_sizes(parser, max_length="what the longest prompt and its new tokens need")
    add_memory(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="see below; may be repeated",
    )
    add_decoding(parser)
    parser.add_argument("--format", choices=("text", "jsonl"), default="text", help="see below (default: %(default)s)")
    parser.add_argument("--stream", action="store_true", help="print a single prompt's text as it comes")


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    how = sampling(arguments)
    check_not_chosen(arguments)
    if arguments.stream and (len(prompts) > 1 or arguments.format != "text"):
        raise OptionError("--stream prints one prompt's text; leave it out for several prompts or --format jsonl")
    if arguments.chat:
        prompts = [prompt.as_chat() for prompt in prompts]
    tokenizer = load_tokenizer(arguments.model)
    ids = [prompt.tokens(tokenizer) for prompt in prompts]
    if arguments.stop:
        how |= {"stop_strings": arguments.stop, "tokenizer": tokenizer}
    is_made = is_artifact(arguments.model)
    if not is_made:
        arguments.max_length = _length(ids, arguments)
    with notes.status("loading" if is_made else "compiling"):
        fast = open_decoder(arguments)
        fast.warmup()
    if arguments.stream:
        from transformers import TextStreamer

        how["streamer"] = TextStreamer(tokenizer, skip_prompt=not prompts[0].text, skip_special_tokens=True)
    with contextlib.nullcontext() if arguments.stream else notes.status("decoding"):
        started = time.perf_counter()
        rows = fast.generate(ids, max_new_tokens=arguments.max_new_tokens, **how)
        seconds = time.perf_counter() - started
    if not arguments.stream:
        completed = [
            prompt.completed(own, row[len(own) :], tokenizer)
            for prompt, own, row in zip(prompts, ids, rows, strict=True)
        ]
        _write(prompts, completed, arguments.format)
    notes.print(stats_table(fast.stats, seconds))


def _length(ids: Sequence[Sequence[int]], arguments: argparse.Namespace) -> int:
    """Tokens that a row has to hold."""
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    needed = len(ids[longest]) + arguments.max_new_tokens
    given: int = arguments.max_length or needed
    if given < needed:
        raise OptionError(
            f"--max-length {given} is less than the {len(ids[longest])} tokens of prompt {longest + 1} "
            f"and {arguments.max_new_tokens} new ones; pass at least {needed}, a smaller --max-new-tokens, or leave "
            "--max-length out"
        )
    return given


def _write(prompts: Sequence[Prompt], completed: Sequence[dict[str, Any]], how: str) -> None:
    """To standard output; not through rich, which expands tabs and drops control characters."""
    for index, (prompt, entry) in enumerate(zip(prompts, completed, strict=True)):
        if how == "jsonl":
            print(json.dumps(entry, ensure_ascii=False))
            continue
        if len(prompts) > 1:
            print(f"=== prompt {index + 1} ===")
        print(prompt.text + entry["completion"])
