"""Models of real sizes in several precisions: speed beside that of transformers, seconds to start, memory.

    python -m bench.real
    python -m bench.real --models smollm2 --precisions float32 int8 --batches 1 8 --json real.json

Of each model and precision there are two starts of the compiled model, in processes of their own: on an empty cache,
and after that. Then all ways to decode alternate in a third process, as `bench.speedup` has them. int8 is torchao's, of
weights only: what transformers does with it is what torchao makes of it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from statistics import median
from typing import TypeVar
from unittest.mock import patch

from rich.progress import Progress
from rich.table import Table

import emssd_compile
from bench import command, shapes, speedup
from bench.candidates import CANDIDATES, Attempt, Task
from bench.figures import Phase
from bench.memory import kv_bytes, resident, start_peak, weight_bytes
from bench.precisions import PRECISIONS, build
from emssd_compile.errors import OptionError

WAYS = ("hf_generate", "hf_generate_static", "ours_none", "ours_auto", "ours_int8_kv")

_IMPORTED = ("emssd_compile.pipeline", "emssd_compile.lowering.regions", "torch._inductor.compile_fx")
"""What a start imports when it first needs it."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Start:
    """A process that compiles a model and decodes; sizes are in bytes, and what imports take does not count.

    Attributes:
        load, optimize, warmup, first_token: seconds of each, one after the other.
        peak: the most memory that there was, once the model was loaded.
        needed: what weights and KV caches take.
    """

    load: float
    optimize: float
    warmup: float
    first_token: float
    peak: int
    needed: int


@dataclass(frozen=True)
class Speed:
    """A way to decode at a batch size.

    Attributes:
        way: its name.
        batch: rows.
        tokens_per_second: of all rows, prompts included; None where it failed.
        first_token: seconds until all rows have their first token.
        acceptance_length: tokens a row and step.
        agreement: what part of the tokens stands before the first of a row that is not the model's own.
        tokens_identical: whether all tokens are those of the model's own decoding of each prompt alone.
        failure: why there are no figures.
    """

    way: str
    batch: int
    tokens_per_second: float | None = None
    first_token: float | None = None
    acceptance_length: float | None = None
    agreement: float | None = None
    tokens_identical: bool | None = None
    failure: str | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Start, decode, print, save."""
    options = parse_arguments(arguments)
    console, tables = command.make_console(), []
    for model in options.models:
        for precision in options.precisions:
            title = f"{model}, {precision}"
            with console.status(title):
                try:
                    starts, speeds = measure(model, precision, options)
                except OptionError as error:
                    console.print(f"{title}: {error}")
                    continue
            tables.append({"title": title, "starts": [*map(asdict, starts)], "rows": [*map(asdict, speeds)]})
            console.print(starts_table(title, starts), speeds_table(title, speeds))
            if options.json:
                command.save(options.json, "bench.real", tables)
    console.print(f"{command.describe(command.hardware())}\n{command.describe(command.versions())}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.argument_parser(__doc__, repeats=3, least_seconds=0)
    number = command.at_least(1)
    parser.add_argument("--models", nargs="+", choices=shapes.NAMES, default=["smollm2", "llama-0.5b"], metavar="NAME")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], metavar="NAME")
    parser.add_argument("--ways", nargs="+", choices=CANDIDATES, default=[*WAYS], metavar="NAME", help="to decode")
    parser.add_argument("--batches", type=number, nargs="+", default=[1, 4, 8, 16], metavar="B", help="(%(default)s)")
    parser.add_argument("--tokens", type=command.at_least(2), default=64, help="new tokens a row (%(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor", help="ours (%(default)s)")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="leave a way out of larger batches when a run takes longer"
    )
    return command.parse(parser, arguments)


def measure(model: str, precision: str, options: argparse.Namespace) -> tuple[list[Start], list[Speed]]:
    """A cold start, a warm one, and the speed of all ways, each in a process of its own."""
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        starts = [apart(start, model, precision, options) for _ in ("cold", "warm")]
        return starts, apart(speeds_of, model, precision, options)


def apart(work: Callable[..., Result], *arguments: object) -> Result:
    """What `work` gives in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def start(name: str, precision: str, options: argparse.Namespace) -> Start:
    """Compile with prompt lookup and decode once, as a program of a user does."""
    for module in _IMPORTED:
        importlib.import_module(module)
    prompts = shapes.spread(shapes.prompts(name), max(options.batches))
    longest, before = max(map(len, prompts)) + options.tokens, start_peak()
    model, load = command.timed(partial(build, name, precision, options.device), options.device)
    start_peak()  # a checkpoint in another dtype is held beside the model while it is loaded
    # a converted model is kept where our kernels are, which the first start has to compile
    os.environ["EMSSD_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    sizes = {"max_batch": len(prompts), "max_length": longest}
    compile_it = partial(emssd_compile.optimize, model, "prompt-lookup", backend=options.backend, **sizes)
    fast, optimize = command.timed(compile_it, options.device)
    _, warmup = command.timed(fast.warmup, options.device)
    _, first_token = command.timed(partial(fast.generate, prompts[:1], max_new_tokens=1), options.device)
    fast.generate(prompts, max_new_tokens=options.tokens, eos_token_id=None)
    needed = weight_bytes(model) + kv_bytes(fast)
    return Start(load, optimize, warmup, first_token, resident("VmHWM") - before, needed)


def speeds_of(name: str, precision: str, options: argparse.Namespace) -> list[Speed]:
    """All ways at all batch sizes, as `bench.speedup` measures them."""
    model, prompts = build(name, precision, options.device), shapes.prompts(name)
    longest = max(map(len, prompts)) + options.tokens
    task = Task(
        model,
        None,
        max_batch=max(options.batches),
        max_length=longest,
        lookup_tokens=7,
        max_ngram=3,
        draft_tokens=4,
        backend=options.backend,
    )
    attempts = {way: Attempt(partial(CANDIDATES[way], task)) for way in options.ways}
    alone = cache(lambda row: speedup.alone(model, [*row], options.tokens))
    speeds = []
    for batch in options.batches:
        rows = shapes.spread(prompts, batch)
        expected = [alone(tuple(row)) for row in rows]
        with Progress(disable=True) as progress:
            figures = speedup.measure(attempts, rows, expected, options, progress)
        for each in figures:
            if each.failure is not None:
                speeds.append(Speed(each.name, batch, failure=each.failure))
                continue
            speed, first = each.tokens_per_second(Phase.TOTAL), median(each.prefill_seconds)
            told = each.acceptance_length, each.agreement, each.identical
            speeds.append(Speed(each.name, batch, speed, first, *told))
    return speeds


def starts_table(title: str, starts: Sequence[Start]) -> Table:
    """For `rich`."""
    table = Table("start", "load, s", "optimize, s", "warmup, s", "first token, s", "peak, MiB", "of weights and KV")
    table.title = title
    for name, each in zip(("cold", "warm"), starts, strict=True):
        seconds = (f"{value:.2f}" for value in (each.load, each.optimize, each.warmup, each.first_token))
        table.add_row(name, *seconds, f"{each.peak >> 20}", f"{each.peak / each.needed:.2f}")
    return table


def speeds_table(title: str, speeds: Sequence[Speed]) -> Table:
    """For `rich`; ratios are over `hf_generate` at the same batch size."""
    table = Table(
        "rows", "way", "tokens/s", "x hf_generate", "first token, s", "tokens a step", "agree", "identical", title=title
    )
    reference = {each.batch: each.tokens_per_second for each in speeds if each.way == "hf_generate"}
    for each in speeds:
        if each.tokens_per_second is None:
            table.add_row(str(each.batch), each.way, each.failure or "")
            continue
        base = reference.get(each.batch)
        ratio = f"{each.tokens_per_second / base:.2f}" if base else ""
        shares = (f"{value:.2f}" for value in (each.first_token, each.acceptance_length, each.agreement))
        cells = f"{each.tokens_per_second:.0f}", ratio, *shares
        table.add_row(str(each.batch), each.way, *cells, "yes" if each.tokens_identical else "no")
    return table


if __name__ == "__main__":
    main()
