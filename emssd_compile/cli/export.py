"""`export`: write a saved model as an artifact that decodes without it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from emssd_compile.cli.models import PROGRAM, add_command, add_model, add_sizes, load_model, optimize
from emssd_compile.export import TARGETS

EXAMPLES = f"""
examples:
  {PROGRAM} export --model llama/ --to onnx --out llama.onnx/
      the whole draft-and-verify step as an ONNX model of standard operators
  {PROGRAM} export --model llama/ --to aot --max-batch 4 --max-length 1024 --out llama.aot/
      machine code for this kind of machine, for four rows of 1024 tokens
  {PROGRAM} export --model llama/ --to onnx --verify-only --out llama.verify/
      the model on packed rows alone, for a loop of your own

In Python, emssd_compile.load("llama.onnx/") gives back an object with the same generate.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "export", "write an artifact that decodes without the model's code", EXAMPLES)
    add_model(parser)
    add_sizes(parser, max_length="the model's limit")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the target")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the artifact: a new or empty folder")
    parser.add_argument("--verify-only", action="store_true", help="without drafting, acceptance and state")
    parser.set_defaults(backend="eager")  # it is never run


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    model = load_model(arguments.model, arguments.dtype, "--model")
    with notes.status("capturing the model"):
        fast = optimize(model, arguments)
    export = {"onnx": fast.export_onnx, "tensorrt": fast.export_tensorrt, "aot": fast.export_aot}[arguments.to]
    export(arguments.out, verify_only=arguments.verify_only, progress=True)
    notes.print(f"{arguments.out} is written; `{PROGRAM} inspect {arguments.out}` shows what is in it")
