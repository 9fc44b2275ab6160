"""What a decoding step costs as batch, context, drafts and model grow, and how much memory it takes.

    python -m bench.scaling --plot scaling.png
    python -m bench.scaling --device cuda --shapes llama-3-8b opt-6.7b --contexts 512 2048 8000 --json scaling.json

One thing grows at a time, the others stay `--at-batch`, `--at-context`, `--at-drafts` and the first of `--shapes`.
Steps are plain (K = 0) or verify K drafts a row, all wrong: T = B (K + 1). No prompt is read for them; see
`bench.roofline`. Steps of different K take turns; figures are medians. Memory is the peak while prompts of
`--at-context` tokens are read and continued, over the bytes of weights and KV cache.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

import emssd_compile
from bench import roofline, shapes
from bench.command import argument_parser, at_least, describe, hardware, make_console, parse, save, versions
from bench.measure import memory_bandwidth
from bench.memory import Memory, peak_memory
from bench.replay import FullWidthDrafter, plant_continuation
from bench.roofline import MeasuredStep
from emssd_compile import OptimizedModel


@dataclass(frozen=True)
class Model:
    """One shape's figures.

    Attributes:
        shape: its name.
        parameters: how many weights it has.
        steps: at every place measured.
        memory: at the base; `None` where it cannot be measured.
    """

    shape: str
    parameters: int
    steps: list[MeasuredStep]
    memory: Memory | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save, draw."""
    options = parse_arguments(arguments)
    console = make_console()
    bandwidth = memory_bandwidth(options.device, options.repeats)
    models: list[Model] = []
    for shape in options.shapes:
        models.append(measure(console, shape, options, bandwidth))
        _forget()
        if options.json:
            save(options.json, "bench.scaling", records(models), dtype=str(options.dtype), base=_base(options))
    console.print(step_table(models, options))
    console.print(memory_table(models))
    if options.plot:
        draw(options.plot, models, options)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shapes", choices=shapes.NAMES, nargs="+", default=["demo"], help="(default: %(default)s)")
    for name, default in {"batches": [1, 2, 4, 8], "contexts": [64, 256, 900], "drafts": [1, 3, 7]}.items():
        parser.add_argument(f"--{name}", type=at_least(1), nargs="+", default=default, help="(default: %(default)s)")
    for name, base in {"batch": 8, "context": 256, "drafts": 7}.items():
        parser.add_argument(f"--at-{name}", type=at_least(1), default=base, help="(default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=64, help="steps of a timed run (default: %(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    return parse(parser, arguments)


def _base(options: argparse.Namespace) -> dict[str, int]:
    return {"batch": options.at_batch, "context": options.at_context, "drafts": options.at_drafts}


def measure(console: Console, shape: str, options: argparse.Namespace, bandwidth: float) -> Model:
    """All figures of one shape: the first one's along every axis, the others' at the base only."""
    base = (options.at_batch, options.at_context)
    places, drafts = {base}, {options.at_drafts}
    if shape == options.shapes[0]:
        places |= {(b, base[1]) for b in options.batches} | {(base[0], c) for c in options.contexts}
        drafts |= set(options.drafts)
    rows = max(batch for batch, _ in places)
    length = max(context for _, context in places) + max(drafts) + 2 + options.steps
    with console.status(f"building {shape}"):
        model = shapes.build(shape, options.device, options.dtype, positions=length)
    if shape not in shapes.TRAINED:
        plant_continuation(model)

    def compile_step(count: int) -> OptimizedModel:
        drafter: str | nn.Module = FullWidthDrafter(count) if count else "none"
        with console.status(f"compiling {shape}, K={count}"):
            fast = emssd_compile.optimize(
                model, drafter, max_batch=rows, max_length=length, backend=options.backend, layout="packed"
            )
            fast.warmup()
        return fast

    compiled = {options.at_drafts: compile_step(options.at_drafts)}
    memory = _memory(compiled[options.at_drafts], options)  # first: nothing else is compiled yet
    compiled |= {count: compile_step(count) for count in sorted({0, *drafts} - compiled.keys())}
    steps: list[MeasuredStep] = []
    for place in sorted(places):
        counts = sorted({0, *drafts} if place == base else {0, options.at_drafts})
        with console.status("timing {}, batch {}, context {}".format(shape, *place)):
            here = {count: compiled[count] for count in counts}
            steps += roofline.measure(here, *place, options.steps, options.repeats, bandwidth)
    return Model(shape, sum(p.numel() for p in model.parameters()), steps, memory)


def _memory(fast: OptimizedModel, options: argparse.Namespace) -> Memory | None:
    prompts = [[row] * options.at_context for row in range(options.at_batch)]
    return peak_memory(fast, lambda: fast.generate(prompts, max_new_tokens=8, eos_token_id=None))


def _forget() -> None:
    """Make room for the next model: compiled code keeps its weights alive."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def records(models: Iterable[Model]) -> list[dict[str, Any]]:
    """The tables as JSON values."""
    steps, memory = [], []
    for model in models:
        facts = {"shape": model.shape, "parameters": model.parameters}
        steps += [{**facts, **asdict(s), "tokens": s.tokens, "times_floor": s.times_floor} for s in model.steps]
        if model.memory:
            memory.append({**facts, **asdict(model.memory), "over_needed": model.memory.over_needed})
    return [{"title": "steps", "rows": steps}, {"title": "memory in bytes", "rows": memory}]


def step_table(models: Iterable[Model], options: argparse.Namespace) -> Table:
    """For `rich`."""
    shown = Table(
        title=f"a decoding step, {options.dtype}, {options.backend}",
        caption=f"{describe(hardware())}\n{describe(versions())}",
    )
    shown.add_column("model")
    for heading in ("parameters", "batch", "context", "K", "T", "step ms", "µs a token", "× floor"):
        shown.add_column(heading, justify="right")
    for model in models:
        for step in model.steps:
            shown.add_row(
                model.shape,
                f"{model.parameters / 1e6:.0f} M",
                *map(str, (step.batch, step.context, step.drafts, step.tokens)),
                f"{step.seconds * 1e3:.3f}",
                f"{step.seconds / step.tokens * 1e6:.1f}",
                f"{step.times_floor:.2f}",
            )
    return shown


def memory_table(models: Iterable[Model]) -> Table:
    """For `rich`."""
    shown = Table(title="peak memory while prompts are read and continued")
    shown.add_column("model")
    for heading in ("weights MB", "KV cache MB", "peak MB", "peak over weights + KV"):
        shown.add_column(heading, justify="right")
    for model in models:
        if memory := model.memory:
            megabytes = (f"{count / 1e6:.1f}" for count in (memory.weights, memory.kv, memory.peak))
            shown.add_row(model.shape, *megabytes, f"{memory.over_needed:.3f}")
        else:
            shown.add_row(model.shape, "not measurable on this system")
    return shown


def draw(path: Path, models: Sequence[Model], options: argparse.Namespace) -> None:
    """Four panels, one for each thing that grows: milliseconds of a step."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(f"one decoding step, {options.dtype}\n{describe(hardware())}", fontsize=10)
    panels = figure.subplots(2, 2).flat
    steps, base = models[0].steps, _base(options)
    for panel, axis in zip(panels, ("batch", "context"), strict=False):
        held = "context" if axis == "batch" else "batch"
        for drafts in (0, options.at_drafts):
            line = [s for s in steps if s.drafts == drafts and getattr(s, held) == base[held]]
            _plot(panel, f"K={drafts}", [(getattr(s, axis), s.seconds) for s in line])
        _label(panel, f"{axis} ({held} {base[held]}, {models[0].shape})")
    at_base = [s for s in steps if (s.batch, s.context) == (base["batch"], base["context"])]
    _plot(panels[2], models[0].shape, [(s.drafts, s.seconds) for s in at_base])
    _label(panels[2], f"K, drafts a row (batch {base['batch']}, context {base['context']})")
    for drafts in (0, options.at_drafts):
        points = [(m.parameters / 1e6, s.seconds) for m in models for s in m.steps if _is_base(s, base, drafts)]
        _plot(panels[3], f"K={drafts}", points)
    _label(panels[3], f"million parameters (batch {base['batch']}, context {base['context']})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _is_base(step: MeasuredStep, base: dict[str, int], drafts: int) -> bool:
    return (step.batch, step.context, step.drafts) == (base["batch"], base["context"], drafts)


def _plot(panel: Axes, label: str, points: Iterable[tuple[float, float]]) -> None:
    x, y = zip(*sorted(points), strict=True)
    panel.plot(x, [seconds * 1e3 for seconds in y], marker="o", label=label)


def _label(panel: Axes, x: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel("ms a step")
    panel.set_ylim(0, 1.1 * panel.dataLim.ymax)
    panel.grid(alpha=0.3)
    panel.legend()


if __name__ == "__main__":
    main()
