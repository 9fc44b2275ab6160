"""`generate`: continue prompts with a saved model."""

from __future__ import annotations

import argparse
import time
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
from emssd_compile.cli.prompts import read_prompts
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

prompt files:
  *.json     a list of prompts, each a string or an object with "text"
  *.jsonl    one such prompt a line
  others     the whole file is one prompt

The text goes to standard output, everything else to standard error.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "generate", "continue prompts greedily", EXAMPLES)
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
    parser.add_argument("--max-new-tokens", metavar="N", type=positive, default=128, help="default: %(default)s")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="inductor", help="eager starts at once (default: %(default)s)"
    )


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    model = load_model(arguments.model, arguments.dtype, "--model")
    tokenizer = load_tokenizer(arguments.model)
    ids: list[list[int]] = tokenizer(prompts)["input_ids"]
    arguments.max_length = arguments.max_length or max(map(len, ids)) + arguments.max_new_tokens
    with notes.status("compiling"):
        fast = optimize(model, arguments)
        fast.warmup()
    with notes.status("decoding"):
        started = time.perf_counter()
        rows = fast.generate(ids, max_new_tokens=arguments.max_new_tokens)
        seconds = time.perf_counter() - started
    for index, (prompt, row) in enumerate(zip(ids, rows, strict=True)):
        if len(ids) > 1:
            print(f"=== prompt {index + 1} ===")
        # Not through rich, which expands tabs and drops control characters.
        print(prompts[index] + tokenizer.decode(row[len(prompt) :], skip_special_tokens=True))
    notes.print(_stats_table(fast.stats, seconds))


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
