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
from rich.table import Table

from emssd_compile.cli.models import (
    PROGRAM,
    add_command,
    add_model,
    add_sizes,
    load_model,
    load_tokenizer,
    optimize,
    positive,
)
from emssd_compile.cli.prompts import Prompt, read_prompts
from emssd_compile.errors import OptionError
from emssd_compile.lowering import BACKENDS
from emssd_compile.stats import Stats

EXAMPLES = f"""
examples:
  {PROGRAM} generate --model llama/ --prompt "def fibonacci(n):"
      drafts by prompt lookup: copies what followed the newest words earlier in the same text
  {PROGRAM} generate --model llama/ --drafter small-llama/ --num-draft-tokens 5 --prompt-file prompts.json
      a smaller model of the same vocabulary drafts; all prompts are decoded together, none is padded
  {PROGRAM} generate --model llama/ --drafter none --backend eager --prompt-file essay.txt
      no drafts and no compilation: slower, and the same text

  {PROGRAM} generate --model llama/ --chat --temperature 0.7 --top-p 0.9 --stop "Q:" --stream --prompt "What is jazz?"
      a chat's answer, drawn, word by word as it comes
  {PROGRAM} generate --model llama/ --prompt-file - --format jsonl
      prompts from standard input, one JSON value a line; each comes back with "completion" added

prompt files:
  *.json     a list of prompts, each a string or an object with "text", or with "messages" for a chat
  *.jsonl    one such prompt a line; - is standard input, read in the same way
  others     the whole file is one prompt

The text goes to standard output, everything else to standard error. With --format jsonl an object a line does: what the
prompt came in, with "completion" and "num_new_tokens" added.
"""

_DRAWING = ("top_k", "top_p", "seed")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "generate", "continue prompts", EXAMPLES)
    add_model(parser)
    add_sizes(parser, max_length="what the longest prompt and its new tokens need")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="see below; may be repeated",
    )
    parser.add_argument("--chat", action="store_true", help="texts are what a user says: use the model's chat template")
    parser.add_argument("--max-new-tokens", metavar="N", type=positive, default=128, help="default: %(default)s")
    parser.add_argument("--stop", metavar="TEXT", action="append", help="ends a text where it comes; may be repeated")
    parser.add_argument("--temperature", metavar="T", type=float, help="draw tokens (default: greedy)")
    parser.add_argument("--top-k", metavar="K", type=positive, help="draw among the K likeliest only")
    parser.add_argument("--top-p", metavar="P", type=float, help="draw among those that make up P together")
    parser.add_argument("--seed", metavar="N", type=int, help="of what is drawn")
    parser.add_argument("--format", choices=("text", "jsonl"), default="text", help="see below (default: %(default)s)")
    parser.add_argument("--stream", action="store_true", help="print a single prompt's text as it comes")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="inductor", help="eager starts at once (default: %(default)s)"
    )


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    how = _sampling(arguments)
    if arguments.stream and (len(prompts) > 1 or arguments.format != "text"):
        raise OptionError("--stream prints one prompt's text; leave it out for several prompts or --format jsonl")
    if arguments.chat:
        prompts = [prompt.as_chat() for prompt in prompts]
    tokenizer = load_tokenizer(arguments.model)
    ids = _tokens(prompts, tokenizer)
    arguments.max_length = _length(ids, arguments)
    if arguments.stop:
        how |= {"stop_strings": arguments.stop, "tokenizer": tokenizer}
    model = load_model(arguments.model, arguments.dtype, "--model")
    with notes.status("compiling"):
        fast = optimize(model, arguments)
        fast.warmup()
    if arguments.stream:
        from transformers import TextStreamer

        how["streamer"] = TextStreamer(tokenizer, skip_prompt=bool(prompts[0].messages), skip_special_tokens=True)
    with contextlib.nullcontext() if arguments.stream else notes.status("decoding"):
        started = time.perf_counter()
        rows = fast.generate(ids, max_new_tokens=arguments.max_new_tokens, **how)
        seconds = time.perf_counter() - started
    if not arguments.stream:
        new = [row[len(prompt) :] for row, prompt in zip(rows, ids, strict=True)]
        _write(prompts, new, [tokenizer.decode(each, skip_special_tokens=True) for each in new], arguments.format)
    notes.print(_stats_table(fast.stats, seconds))


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `generate` that say how tokens are drawn."""
    given = {name: value for name in _DRAWING if (value := getattr(arguments, name)) is not None}
    if arguments.temperature is None:
        if given:
            name = "--" + next(iter(given)).replace("_", "-")
            raise OptionError(f"{name} is for tokens that are drawn; pass --temperature as well, such as 1.0")
        return {}
    return {"do_sample": True, "temperature": arguments.temperature, **given}


def _tokens(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """Ids of each prompt; those of a chat end where the answer begins."""
    if any(prompt.messages for prompt in prompts) and tokenizer.chat_template is None:
        raise OptionError("--model has no chat template; leave --chat out, and write prompts as texts")
    return [
        tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True)["input_ids"]
        if prompt.messages
        else tokenizer(prompt.text)["input_ids"]
        for prompt in prompts
    ]


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


def _write(prompts: Sequence[Prompt], new: Sequence[Sequence[int]], completions: Sequence[str], how: str) -> None:
    """To standard output; not through rich, which expands tabs and drops control characters."""
    for index, (prompt, ids, completion) in enumerate(zip(prompts, new, completions, strict=True)):
        if how == "jsonl":
            print(
                json.dumps({**prompt.entry, "completion": completion, "num_new_tokens": len(ids)}, ensure_ascii=False)
            )
            continue
        if len(prompts) > 1:
            print(f"=== prompt {index + 1} ===")
        print(prompt.text + completion)


def _stats_table(stats: Stats, seconds: float) -> Table:
    table = Table(title="decoding", show_header=False)
    for name, value in {
        "seconds": f"{seconds:.2f}",
        "tokens": f"{stats.num_emitted_tokens}",
        "tokens/s": f"{stats.num_emitted_tokens / seconds:.1f}",
        "steps": f"{stats.num_steps}",
        "tokens a row and step": f"{stats.mean_acceptance_length:.2f}",
        "drafts accepted": f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens}",
        "padding tokens": f"{stats.num_padding_tokens}",
    }.items():
        table.add_row(name, value)
    return table
