"""What a step costs besides its arithmetic: the host's share, the profile, and the compile time of a second start.

    python -m bench.overhead
    python -m bench.overhead --batch 8 --json overhead.json

The host's share is the part of `generate`'s decoding, prompts left out, that is spent outside the compiled step: plans,
reports, tokens handed out. Starts are new processes on a cache folder of their own, empty for the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import emssd_compile
from bench import shapes
from bench.command import (
    argument_parser,
    at_least,
    describe,
    hardware,
    make_console,
    parse,
    save,
    synchronize,
    versions,
)
from emssd_compile import LoadedModel, OptimizedModel
from emssd_compile.runtime.buckets import StepSizes

_START = """
import json, sys, time
import emssd_compile
from bench import shapes
from bench.command import parse, argument_parser
options = parse(argument_parser(""), ["--device", sys.argv[2], "--dtype", sys.argv[3]])
model = shapes.build(sys.argv[1], options.device, options.dtype)
started = time.perf_counter()
fast = emssd_compile.optimize(model, "prompt-lookup", max_batch=int(sys.argv[4]), max_length=1024)
captured = time.perf_counter()
fast.warmup()
print(json.dumps({"capture_seconds": captured - started, "compile_seconds": time.perf_counter() - captured}))
"""


@dataclass(frozen=True)
class Decoding:
    """One `generate`, its prompts left out.

    Attributes:
        seconds: of decoding.
        step_seconds: spent in calls of the compiled step.
        num_steps: how many.
    """

    seconds: float
    step_seconds: float
    num_steps: int

    @property
    def host_share(self) -> float:
        """Of the time, what is spent outside the compiled step."""
        return 1 - self.step_seconds / self.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    options = parse_arguments(arguments)
    console = make_console()
    model = shapes.build(options.shape, options.device, options.dtype)
    fast = emssd_compile.optimize(model, max_batch=options.batch, max_length=1024, backend=options.backend)
    with console.status("compiling"):
        fast.warmup()
    prompts = shapes.spread(shapes.prompts(options.shape), options.batch)
    with console.status("decoding"):
        decodings = [decode(fast, prompts, options.tokens) for _ in range(options.repeats + 1)][1:]
        profile = profile_ops(fast, prompts, options.tokens)
    host_share = statistics.median(decoding.host_share for decoding in decodings)
    step = statistics.median(decoding.seconds / decoding.num_steps for decoding in decodings)
    console.print(_profile_table(profile, options, step, host_share))
    starts = [] if options.no_starts else measure_starts(console, options)
    if starts:
        console.print(_starts_table(starts))
    console.print(f"{describe(hardware())}\n{describe(versions())}")
    if options.json:
        figures = {"host_share": host_share, "step_seconds": step, "runs": [asdict(d) for d in decodings]}
        save(options.json, "bench.overhead", [{**figures, "profile": profile, "starts": starts}], model=options.shape)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=shapes.NAMES, default="demo", help="model (default: %(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows (default: %(default)s)")
    parser.add_argument("--tokens", type=at_least(2), default=128, help="new tokens a row (default: %(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--no-starts", action="store_true", help="do not measure a first and a second start")
    return parse(parser, arguments)


def decode(fast: OptimizedModel | LoadedModel, prompts: list[list[int]], tokens: int) -> Decoding:
    """Decode `tokens` of each prompt without EOS; steps that read prompts are left out."""
    launcher = fast._engine.launcher
    run, calls = launcher._run, list[tuple[float, float]]()
    device = fast.device

    def timed_run(sizes: StepSizes) -> dict[str, Tensor]:
        started = time.perf_counter()
        results = run(sizes)
        synchronize(device)
        calls.append((started, time.perf_counter()))
        return results

    launcher._run = timed_run  # type: ignore[method-assign]
    try:
        fast.generate(prompts, max_new_tokens=tokens, eos_token_id=None)
        ended = time.perf_counter()
    finally:
        launcher._run = run  # type: ignore[method-assign]
    num_reading = -(-sum(map(len, prompts)) // fast._engine.chunk)
    decoding = calls[num_reading:]
    return Decoding(ended - decoding[0][0], sum(end - start for start, end in decoding), len(decoding))


def profile_ops(fast: OptimizedModel, prompts: list[list[int]], tokens: int, most: int = 8) -> dict[str, float]:
    """Share of the time of each op, largest first; prompts included. Kernels that Inductor wrote are one entry."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        fast.generate(prompts, max_new_tokens=tokens, eos_token_id=None)
    seconds = {"compiled by Inductor": 0.0}
    for event in profiler.key_averages():
        name = event.key if "::" in event.key else "compiled by Inductor"
        seconds[name] = seconds.get(name, 0.0) + event.self_cpu_time_total
    total = sum(seconds.values())
    shares = sorted(((name, spent / total) for name, spent in seconds.items()), key=lambda item: -item[1])
    return dict(shares[:most])


def measure_starts(console: Console, options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of capture and of compilation, in a process that starts on an empty cache and in one after it."""
    dtype = str(options.dtype).removeprefix("torch.")
    command = [sys.executable, "-c", _START, options.shape, options.device.type, dtype, str(options.batch)]
    starts = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        for name in ("first start", "second start"):
            with console.status(name):
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            starts.append(json.loads(done.stdout.splitlines()[-1]))
    return starts


def _profile_table(profile: dict[str, float], options: argparse.Namespace, step: float, host_share: float) -> Table:
    title = f"{options.shape}, batch {options.batch}: {1e3 * step:.2f} ms a step, {host_share:.1%} of it on the host"
    table = Table("op", "share", title=title)
    for name, share in profile.items():
        table.add_row(name, f"{share:.1%}")
    return table


def _starts_table(starts: list[dict[str, float]]) -> Table:
    table = Table("", "capture and passes, s", "compilation, s", "of the first")
    for name, start in zip(("first start", "second start"), starts, strict=True):
        share = start["compile_seconds"] / starts[0]["compile_seconds"]
        table.add_row(name, f"{start['capture_seconds']:.1f}", f"{start['compile_seconds']:.1f}", f"{share:.0%}")
    return table


if __name__ == "__main__":
    main()
