"""Whether the artifacts of an export target give the model's own tokens.

    python -m bench.gpu_suite.artifacts --target onnx --device cuda --json onnx.json

Tokens are judged as by `bench.gpu_suite.exactness`: in half precision, ties may break either way. How long steps take
is in `bench.exports`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import emssd_compile
from bench.command import argument_parser, make_console, parse, save
from bench.gpu_suite.exactness import Case, Verdict, greedy, judge, subject, table
from emssd_compile.errors import EmssdError
from emssd_compile.export import find_target

CASES = {
    "tensorrt": (
        Case("llama", torch.float16, "prompt-lookup", "tensorrt"),
        Case("bloom", torch.bfloat16, "prompt-lookup", "tensorrt"),  # attention by a mask
        Case("demo", torch.float16, "prompt-lookup", "tensorrt", "auto"),
        Case("demo", torch.float32, "none", "tensorrt decomposed"),
    ),
    "onnx": (
        Case("llama", torch.float32, "prompt-lookup", "onnx"),
        Case("bloom", torch.float32, "prompt-lookup", "onnx"),  # attention by a mask
        Case("demo", torch.float16, "prompt-lookup", "onnx", "auto"),
    ),
}
"""By target, the quickest first. `backend` is the target; decomposed attention is what float32 needs in TensorRT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, load, decode, compare, print, save after each case; returns 1 if something fails."""
    options = parse_arguments(arguments)
    reason = missing(options.target, options.device)
    if reason:
        return _finish(options, {}, skipped=reason)
    verdicts: dict[Case, Verdict] = {}
    for case in CASES[options.target][: 1 if options.smoke else None]:
        verdicts[case] = run(case, options.device)
        status = _finish(options, verdicts)
    make_console().print(table(verdicts))
    return status


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--target", choices=CASES, required=True)
    parser.add_argument("--smoke", action="store_true", help="a toy model only")
    return parse(parser, arguments)


def missing(target_name: str, device: torch.device) -> str:
    """What the target needs, to build and to run on a device, and is not here; empty if all is."""
    target = find_target(target_name)
    if device.type not in target.devices:
        return f"{target_name} runs on {' or '.join(target.devices)}"
    try:
        target.require(target.options(), device, True)
    except EmssdError as error:
        return str(error)
    return ""


def run(case: Case, device: torch.device) -> Verdict:
    """Export a case, load it, decode, and compare every row with the model's own tokens."""
    verdict = Verdict()
    target, *decomposed = case.backend.split()
    given: dict[str, Any] = {"attention": "decomposed"} if decomposed else {}
    try:
        model, prompts, num_new = subject(case, device)
        capacity = max(map(len, prompts)) + num_new
        fast = emssd_compile.optimize(
            model, case.drafter, max_batch=len(prompts), max_length=capacity, backend="eager", layout=case.layout
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "artifact"
            getattr(fast, f"export_{target}")(folder, **given)
            loaded = emssd_compile.load(folder, device=device)
            rows = loaded.generate(prompts, max_new_tokens=num_new, eos_token_id=None)
        single = None if case.dtype == torch.float32 else copy.deepcopy(model).float()
        for row, ids in zip(rows, prompts, strict=True):
            judge(verdict, model, single, ids, list(row[len(ids) :]), greedy(model, ids, num_new))
    except Exception as error:  # the other cases are still worth knowing
        verdict.failure = f"{type(error).__name__}: {error}"
    return verdict


def _finish(options: argparse.Namespace, verdicts: dict[Case, Verdict], **context: str) -> int:
    """Save what is known so far: a runtime may end the process in the next case."""
    for reason in context.values():
        print(f"{options.target}: {reason}")
    if options.json:
        rows = [{**asdict(c), "dtype": str(c.dtype), **asdict(v)} for c, v in verdicts.items()]
        save(options.json, "bench.gpu_suite.artifacts", [{"title": options.target, "rows": rows}], **context)
    return int(not all(verdict.good for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
