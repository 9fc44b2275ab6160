"""Export targets on a GPU: which can be imported, and whether TensorRT engines give the model's own tokens.

    python -m bench.gpu_suite.engines --device cuda --json engines.json

Tokens are judged as by `bench.gpu_suite.exactness`: an engine is in half precision, and ties may break either way. How
long its steps take is in `bench.exports`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import emssd_compile
import emssd_compile.export
from bench.command import argument_parser, make_console, parse, save
from bench.gpu_suite.exactness import Case, Verdict, greedy, judge, subject, table
from emssd_compile.errors import ArtifactError

CASES = (
    Case("llama", torch.float16, "prompt-lookup", "tensorrt"),
    Case("bloom", torch.bfloat16, "prompt-lookup", "tensorrt"),  # attention by a mask
    Case("demo", torch.float16, "prompt-lookup", "tensorrt", "auto"),
    Case("demo", torch.float32, "none", "tensorrt decomposed"),
)
"""`backend` is the target; decomposed attention is what float32 needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Import each, run engines where there is a GPU, print, save; returns 1 if something fails."""
    options = parse_arguments(arguments)
    console = make_console()
    package = emssd_compile.export
    names = [name for _, name, is_package in pkgutil.iter_modules(package.__path__) if is_package]
    found = {name: _import(f"{package.__name__}.{name}") for name in names}
    for line in [f"{name}: {answer}" for name, answer in found.items()]:
        console.print(line)
    missing = _missing(options.device)
    verdicts = {} if missing else {case: run(case, options.device) for case in CASES}
    console.print(f"no engine was run: {missing}" if missing else table(verdicts))
    if options.json:
        imports = [{"target": name, "import": answer} for name, answer in found.items()]
        engines = [{**asdict(c), "dtype": str(c.dtype), **asdict(v)} for c, v in verdicts.items()]
        tables = [{"title": "export targets", "rows": imports}, {"title": "engines", "rows": engines}]
        save(options.json, "bench.gpu_suite.engines", tables, **({"skipped_engines": missing} if missing else {}))
    return int(any(answer != "ok" for answer in found.values()) or not all(v.good for v in verdicts.values()))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return parse(argument_parser(__doc__), arguments)


def run(case: Case, device: torch.device) -> Verdict:
    """Export a case to an engine, load it, decode, and compare every row with the model's own tokens."""
    verdict = Verdict()
    model, prompts, num_new = subject(case, device)
    capacity = max(map(len, prompts)) + num_new
    try:
        fast = emssd_compile.optimize(
            model, case.drafter, max_batch=len(prompts), max_length=capacity, backend="eager", layout=case.layout
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "artifact"
            fast.export_tensorrt(folder, attention="decomposed" if "decomposed" in case.backend else "fused")
            loaded = emssd_compile.load(folder, device=device)
            rows = loaded.generate(prompts, max_new_tokens=num_new, eos_token_id=None)
    except Exception as error:  # the other cases are still worth knowing
        verdict.failure = f"{type(error).__name__}: {error}"
        return verdict
    single = None if case.dtype == torch.float32 else copy.deepcopy(model).float()
    for row, ids in zip(rows, prompts, strict=True):
        judge(verdict, model, single, ids, list(row[len(ids) :]), greedy(model, ids, num_new))
    return verdict


def _missing(device: torch.device) -> str:
    """What engines need and is not here; empty if all is."""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    try:
        from emssd_compile.export.tensorrt.library import find_runtime

        find_runtime()
    except (ArtifactError, ImportError) as error:
        return str(error)
    return ""


def _import(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a target whose libraries are broken may raise anything
        return f"{type(error).__name__}: {error}"
    return "ok"


if __name__ == "__main__":
    sys.exit(main())
