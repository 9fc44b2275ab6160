"""`export`: write a saved model as an artifact that decodes without it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import emssd_compile.export as targets
from emssd_compile.cli.models import PROGRAM, add_command, add_model, add_sizes, load_model, optimize, tokenizer_beside
from emssd_compile.cli.target_options import add_target_options, target_options
from emssd_compile.export.folder import check_new
from emssd_compile.exporting import prepare

EXAMPLES = f"""
examples:
  {PROGRAM} export --model llama/ --to onnx --out llama.onnx/
      the whole draft-and-verify step as an ONNX model of standard operators
  {PROGRAM} export --model llama/ --to aot --max-batch 4 --max-length 1024 --out llama.aot/
      machine code for this kind of machine, for four rows of 1024 tokens
  {PROGRAM} export --model llama/ --to tensorrt --dtype float16 --compute-capability 8.9 --out llama.trt/
      an engine for a GPU that need not be here
  {PROGRAM} export --model llama/ --to tensorrt --runtime tensorrt-rtx --attention decomposed --out llama.trt/
      in float32, which TensorRT has no kernel of attention for
  {PROGRAM} export --model llama/ --to aot --row-options repetition_penalty bad_words_ids --out llama.aot/
      with what each request may set for the logits
  {PROGRAM} export --model llama/ --to onnx --verify-only --out llama.verify/
      the model on packed rows alone, for a loop of your own

The tokenizer beside the model is copied into the artifact, and then `{PROGRAM} generate --model llama.onnx/` takes
text. In Python, emssd_compile.load("llama.onnx/") gives back an object with the same generate.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "export", "write an artifact that decodes without the model's code", EXAMPLES)
    add_model(parser)
    add_sizes(parser, max_length="the model's limit")
    parser.add_argument("--to", choices=targets.TARGETS, required=True, help="the target")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the artifact: a new or empty folder")
    parser.add_argument(
        "--row-options", metavar="NAME", nargs="*", help="options of generate that it is to honour, such as do_sample"
    )
    parser.add_argument("--verify-only", action="store_true", help="without drafting, acceptance and state")
    parser.add_argument("--no-check", action="store_true", help="do not decode with it and compare the tokens")
    add_target_options(parser)
    parser.set_defaults(backend="eager", memory="auto", kv_tokens=None)  # it is never run
    parser.set_defaults(prefix_cache=False, kv_dtype=None)


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    options = target_options(arguments)
    common: dict[str, Any] = {"verify_only": arguments.verify_only, "check": not arguments.no_check}
    check_new(arguments.out)  # before the work, which takes a while
    prepare(arguments.to, options, torch.device("cpu"), getattr(torch, arguments.dtype), **common)
    tokenizer = tokenizer_beside(arguments.model)
    model = load_model(arguments.model, arguments.dtype, "--model")
    with notes.status("capturing the model"):
        fast = optimize(model, arguments)
    export = getattr(fast, f"export_{arguments.to}")
    common |= {"row_options": arguments.row_options, "tokenizer": tokenizer}
    export(arguments.out, progress=True, **common, **options)
    notes.print(f"{arguments.out} is written; `{PROGRAM} inspect {arguments.out}` shows what is in it")
