"""A decoding step against the least time that memory allows: weights and KV cache read once at the measured bandwidth.

    python -m bench.roofline
    python -m bench.roofline --device cuda --shape llama-3-8b --batches 1 8 32 --contexts 512 4096 --json roofline.json

Two steps are measured: plain decoding, T = B tokens, and verification at full width, T = B (K + 1), whose drafts are
all wrong, so that a step costs what a step can cost. No prompt is read: rows start at their context. The floor counts
every weight but rows of embeddings that nobody asks for, and keys and values of every token of the context, in the
mean over the steps that were timed; drafts add nothing. A model that fits into a cache can beat it. Steps take turns;
figures are medians. Below, attention alone, at the model's heads: see `bench.kernels`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

import emssd_compile
from bench import kernels, shapes
from bench.command import (
    argument_parser,
    at_least,
    describe,
    hardware,
    make_console,
    make_progress,
    parse,
    save,
    versions,
)
from bench.kernel_cases import Case
from bench.measure import memory_bandwidth, steady_step
from bench.replay import FullWidthDrafter, plant_continuation
from bench.timing import alternate
from emssd_compile import OptimizedModel


@dataclass(frozen=True)
class MeasuredStep:
    """A measured step.

    Attributes:
        drafts: K; 0 is plain decoding.
        batch: B.
        context: tokens of each row to begin with.
        seconds: of one step, the median.
        floor_seconds: `floor_seconds`.
    """

    drafts: int
    batch: int
    context: int
    seconds: float
    floor_seconds: float

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * (self.drafts + 1)

    @property
    def times_floor(self) -> float:
        """How many times the floor the step takes; 1 is the best there is."""
        return self.seconds / self.floor_seconds


def floor_seconds(weight_bytes: int, kv_token_bytes: int, num_tokens: float, bandwidth: float) -> float:
    """Least time of a step.

    Args:
        weight_bytes: `weight_bytes(model)`.
        kv_token_bytes: bytes of one token's keys and values in all layers.
        num_tokens: tokens in the KV caches of all rows.
        bandwidth: bytes a second.
    """
    return (weight_bytes + kv_token_bytes * num_tokens) / bandwidth


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a step reads whole: all of them, but for embeddings that are not also the LM head."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    gathered = tables - multiplied
    return sum(p.numel() * p.element_size() for p in model.parameters() if p not in gathered)


def kv_token_bytes(fast: OptimizedModel) -> int:
    """Bytes that one token takes in the KV caches of all layers."""
    specs = fast._step.compiled.cache_shapes.values()
    return sum(math.prod(spec.shape[2:]) * spec.dtype.itemsize for spec in specs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, measure, print, save."""
    options = parse_arguments(arguments)
    console = make_console()
    bandwidth = memory_bandwidth(options.device, options.repeats)
    with console.status(f"compiling {options.shape}"):
        compiled = compile_steps(options)
    tables: list[dict[str, Any]] = []

    def keep(title: str, rows: list[dict[str, Any]]) -> None:
        tables[:] = [table for table in tables if table["title"] != title]
        tables.append({"title": title, "bandwidth_bytes_per_second": bandwidth, "rows": rows})
        if options.json:
            context = {"shape": options.shape, "layers": options.layers, "dtype": str(options.dtype)}
            save(options.json, "bench.roofline", tables, **context)

    steps: list[MeasuredStep] = []
    places = list(itertools.product(options.contexts, options.batches))
    with make_progress(console) as progress:
        for context, batch in progress.track(places, description="timing steps"):
            steps += measure(compiled, batch, context, options.steps, options.repeats, bandwidth)
            keep("steps", [{**asdict(s), "tokens": s.tokens, "times_floor": s.times_floor} for s in steps])
    shape = f"{options.layers} layers of {options.shape}" if options.layers else options.shape
    console.print(table(steps, shape, str(options.dtype), bandwidth))
    show_attention(console, compiled[0], places, options, bandwidth, keep)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=shapes.NAMES, default="demo", help="model (default: %(default)s)")
    parser.add_argument("--layers", type=at_least(1), help="of it; fewer compile sooner (default: all)")
    parser.add_argument("--batches", type=at_least(1), nargs="+", default=[1, 8], help="rows (default: %(default)s)")
    parser.add_argument("--contexts", type=at_least(1), nargs="+", default=[128, 900], help="(default: %(default)s)")
    parser.add_argument("--drafts", type=at_least(1), default=7, help="K of verification (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=64, help="steps of a timed run (default: %(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    return parse(parser, arguments)


def compile_steps(options: argparse.Namespace) -> dict[int, OptimizedModel]:
    """The model compiled for plain decoding and for verification, by K."""
    length = max(options.contexts) + options.drafts + 2 + options.steps
    model = shapes.build(options.shape, options.device, options.dtype, positions=length, layers=options.layers)
    if options.shape not in shapes.TRAINED:
        plant_continuation(model)
    drafters: dict[int, str | nn.Module] = {0: "none", options.drafts: FullWidthDrafter(options.drafts)}
    found = {}
    for drafts, drafter in drafters.items():
        found[drafts] = emssd_compile.optimize(
            model, drafter, max_batch=max(options.batches), max_length=length, backend=options.backend, layout="packed"
        )
        found[drafts].warmup()
    return found


def measure(
    compiled: dict[int, OptimizedModel], batch: int, context: int, num_steps: int, repeats: int, bandwidth: float
) -> list[MeasuredStep]:
    """Every compiled step at one place, alternating."""
    runs = {drafts: partial(steady_step, fast, batch, context, num_steps) for drafts, fast in compiled.items()}
    found = {drafts: timed for drafts, (_, *timed) in alternate(runs, repeats).items()}
    return [
        MeasuredStep(
            drafts,
            batch,
            context,
            statistics.median(step.seconds for step in found[drafts]),
            floor_seconds(weight_bytes(fast.model), kv_token_bytes(fast), batch * found[drafts][0].context, bandwidth),
        )
        for drafts, fast in compiled.items()
    ]


def show_attention(
    console: Console,
    fast: OptimizedModel,
    places: Iterable[tuple[int, int]],
    options: argparse.Namespace,
    bandwidth: float,
    keep: Callable[[str, list[dict[str, Any]]], None],
) -> None:
    """Time attention alone at the heads of the model's first layer, and print it."""
    found: list[kernels.Measurement] = []
    heads = (fast.config.num_attention_heads, *next(iter(fast._step.compiled.cache_shapes.values())).shape[2:])
    for (context, batch), drafts in itertools.product(places, (0, options.drafts)):
        case = Case(batch, context, drafts + 1, *heads)
        with console.status("timing attention alone"):
            found += kernels.measure(case, options.device, options.dtype, bandwidth, options.repeats)
        keep("attention kernels", kernels.record(found, bandwidth)["rows"])
    console.print(kernels.table(found, bandwidth, str(options.dtype)))


def table(steps: Iterable[MeasuredStep], shape: str, dtype: str, bandwidth: float) -> Table:
    """For `rich`."""
    shown = Table(
        title=f"a decoding step of {shape}, {dtype}; measured bandwidth {bandwidth / 1e9:.1f} GB/s",
        caption=f"{describe(hardware())}\n{describe(versions())}",
    )
    for heading in ("batch", "context", "K", "T", "step ms", "floor ms", "× floor"):
        shown.add_column(heading, justify="right")
    for step in steps:
        shown.add_row(
            *map(str, (step.batch, step.context, step.drafts, step.tokens)),
            f"{step.seconds * 1e3:.3f}",
            f"{step.floor_seconds * 1e3:.3f}",
            f"{step.times_floor:.2f}",
        )
    return shown


if __name__ == "__main__":
    main()
