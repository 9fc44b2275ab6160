"""`explain`: what the compiler makes of a saved model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import emssd_compile
from emssd_compile.cli.models import PROGRAM, add_command, add_model, load_model, optimize

EXAMPLES = f"""
examples:
  {PROGRAM} explain --model llama/
      what each pass changed, what it left alone and why, and which ops the fused step holds
  {PROGRAM} explain --model llama/ --drafter none --dump stages/
      also write the graph before and after each pass as readable code: stages/NN_<pass>.before.py and .after.py

A model that cannot be compiled exactly is refused, with the node, its op and its module.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "explain", "show what the compiler does with a model", EXAMPLES)
    add_model(parser)
    parser.add_argument("--dump", metavar="DIR", type=Path, help="write every stage of the graph there")
    # The passes do the same whatever the sizes are; these are small so that a large model's KV cache is.
    parser.set_defaults(max_batch=1, max_length=64, backend="eager", layout="auto", deterministic=False)
    parser.set_defaults(memory="auto", kv_tokens=None, prefix_cache=False, kv_dtype=None)


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    model = load_model(arguments.model, arguments.dtype, "--model")
    with emssd_compile.dump(arguments.dump) if arguments.dump else contextlib.nullcontext():
        fast = optimize(model, arguments)
    # As a string: its tables keep their width when the output is a file or a narrow terminal.
    sys.stdout.write(str(fast.explain()))
    if arguments.dump:
        notes.print(f"stages written to {arguments.dump}; summary.txt lists them")
