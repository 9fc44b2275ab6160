"""What each acceptance rule gets out of the same drafts when tokens are drawn, and what drawing them costs a step.

    python -m bench.acceptance
    python -m bench.acceptance --target models/large --draft models/small --json acceptance.json
    python -m bench.acceptance --target models/smollm2 --draft-bits 4 --rules match token-level block traversal

The first table is the demo pair (or another one) with each rule and shape of drafts: tokens a row and step (block
efficiency; 1 without drafts) and tokens a second. The second one is the target alone: a step that draws, over a greedy
one. Runs alternate; prompts are read in each of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

import emssd_compile
from bench import plots, shapes
from bench.command import argument_parser, at_least, describe, hardware, make_console, parse, save, timed, versions
from bench.timing import alternate, median_ratio
from emssd_compile import OptimizedModel
from emssd_compile.acceptance import RULES
from emssd_compile.drafters import DraftModel
from emssd_compile.step.proposals import misfit

CHAIN, TREE = "chain of 4", "tree (4, 2, 2)"
SHAPES: dict[str, dict[str, Any]] = {CHAIN: {"num_draft_tokens": 4}, TREE: {"tree": (4, 2, 2)}}
NOT_DRAWN = ("greedy",)  # cannot sample
FILTERS = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "draw": {"do_sample": True, "top_k": 0},
    "temperature, top-k, top-p": FILTERS,
    "and a repetition penalty": {**FILTERS, "repetition_penalty": 1.05},
}


@dataclass(frozen=True)
class Drawn:
    """One run.

    Attributes:
        seconds: from prompts in to tokens out.
        num_tokens: new ones, all rows together.
        num_steps: launches of the step.
        efficiency: tokens a row and step.
    """

    seconds: float
    num_tokens: int
    num_steps: int
    efficiency: float


@dataclass(frozen=True)
class Row:
    """A rule with a shape of drafts, in the mean over the runs.

    Attributes:
        rule: its name.
        shape: a key of `SHAPES`.
        efficiency: tokens a row and step.
        tokens_per_second: of all rows.
        speedup: over the target alone, in the median.
    """

    rule: str
    shape: str
    efficiency: float
    tokens_per_second: float
    speedup: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save, draw."""
    options = parse_arguments(arguments)
    console = make_console()
    target, draft = load(options)
    prompts = shapes.spread(shapes.prompts_for(options.target), options.batch)
    sampling = {"do_sample": True, "top_k": 0, "temperature": options.temperature}
    with console.status("compiling"):
        alone = compile_with(target, "none", "match", options)
        drawing = {("none", ""): partial(draw, alone, prompts, options.tokens, sampling)} | {
            (rule, shape): partial(
                draw, compile_with(target, DraftModel(draft, **SHAPES[shape]), rule, options), prompts, options.tokens,
                sampling,
            )
            for rule, shape in combinations(draft)
            if rule in options.rules
        }  # fmt: skip
    with console.status("drawing"):
        rows = summed_up(alternate(drawing, options.repeats))
        ways = {name: partial(draw, alone, prompts, options.tokens, way) for name, way in WAYS.items()}
        costs = step_ratios(alternate(ways, options.repeats, least_seconds=options.least_seconds))
    pair = f"{options.target.name if options.target else 'demo'}" + (
        f" and its weights in {options.draft_bits} bits" if options.draft_bits else " pair"
    )
    title = f"{pair}, {options.backend}, batch {options.batch}, temperature {options.temperature:g}"
    console.print(rules_table(rows, title))
    console.print(costs_table(costs))
    console.print(f"{describe(hardware())}\n{describe(versions())}")
    if options.json:
        save(options.json, "bench.acceptance", [{"rules": [asdict(row) for row in rows], "steps": costs}], title=title)
    if options.plot:
        heights = {rule: {row.shape: row.efficiency for row in rows if row.rule == rule} for rule in options.rules}
        plots.bars(
            options.plot,
            f"{title}\n{describe(hardware())}",
            {rule: of_shapes for rule, of_shapes in heights.items() if of_shapes},
            y_label="tokens a row and step",
            level=1,
        )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, repeats=5, least_seconds=20)
    parser.add_argument("--target", type=Path, metavar="DIR", help="a model of transformers (default: the demo's)")
    draft = parser.add_mutually_exclusive_group()
    draft.add_argument("--draft", type=Path, metavar="DIR", help="its draft model (default: the demo's)")
    draft.add_argument(
        "--draft-bits", type=at_least(2), metavar="N", help="draft with the target, its matrices rounded to N bits"
    )
    parser.add_argument("--rules", nargs="+", choices=RULES, default=[*RULES], metavar="NAME", help="(default: all)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows (default: %(default)s)")
    parser.add_argument("--tokens", type=at_least(2), default=128, help="new tokens a row (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the first table (default: %(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    options = parse(parser, arguments)
    if (options.target is None) != (options.draft is None) and options.draft_bits is None:
        parser.error("--target and --draft: pass both, or neither")
    return options


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The target and its draft model."""

    def make(name: str, path: Path | None) -> PreTrainedModel:
        if path is None:
            return shapes.build(name, options.device, options.dtype)
        return shapes.pretrained(path, options.device, options.dtype)

    target = make("demo", options.target)
    if options.draft_bits is None:
        return target, make("demo-draft", options.draft)
    return target, rounded(make("demo", options.target), options.draft_bits)


@torch.no_grad()
def rounded(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """The model with each row of its layers' matrices rounded to so many bits: a draft model that errs as they do."""
    most = 2 ** (bits - 1) - 1
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            unit = module.weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / most
            module.weight.copy_((module.weight / unit).round() * unit)
    return model


def combinations(draft: PreTrainedModel) -> list[tuple[str, str]]:
    """Rules that can draw, with the shapes that each of them verifies."""
    return [
        (rule, shape)
        for shape, made in SHAPES.items()
        for rule, make in RULES.items()
        if rule not in NOT_DRAWN and not misfit(make(), DraftModel(draft, **made))
    ]


def compile_with(
    target: PreTrainedModel, drafter: str | DraftModel, rule: str, options: argparse.Namespace
) -> OptimizedModel:
    """The target with a rule, all drafts verified."""
    sizes = {"max_batch": options.batch, "max_length": 512 + options.tokens}
    return emssd_compile.optimize(target, drafter, acceptance=rule, layout="packed", backend=options.backend, **sizes)


def draw(fast: OptimizedModel, prompts: list[list[int]], tokens: int, how: dict[str, Any]) -> Drawn:
    """Continue all prompts without EOS; every run has the same seeds."""
    fast.stats.reset()
    decode: Callable[[], Any] = partial(fast.generate, prompts, max_new_tokens=tokens, eos_token_id=None, seed=0, **how)
    seconds = timed(decode, fast.device)[1]
    return Drawn(seconds, len(prompts) * tokens, fast.stats.num_steps, fast.stats.mean_acceptance_length)


def summed_up(runs: dict[tuple[str, str], list[Drawn]]) -> list[Row]:
    """One row for each rule and shape; the first of `runs` is the target alone, and each list begins with a warm-up."""
    alone = next(iter(runs.values()))[1:]
    return [
        Row(
            rule,
            shape,
            statistics.mean(run.efficiency for run in timed_runs),
            statistics.median(run.num_tokens / run.seconds for run in timed_runs),
            median_ratio([run.seconds for run in alone], [run.seconds for run in timed_runs]),
        )
        for (rule, shape), (_, *timed_runs) in runs.items()
    ]


def step_ratios(runs: dict[str, list[Drawn]]) -> dict[str, float]:
    """Seconds a step over those of the first way, in the median over the repeats."""
    steps = {name: [run.seconds / run.num_steps for run in timed_runs] for name, (_, *timed_runs) in runs.items()}
    first = next(iter(steps.values()))
    return {name: median_ratio(seconds, first) for name, seconds in steps.items()}


def rules_table(rows: list[Row], title: str) -> Table:
    """For `rich.print`."""
    table = Table("rule", "drafts", "tokens a row and step", "tokens/s", "× alone", title=title)
    for row in rows:
        figures = (f"{row.efficiency:.2f}", f"{row.tokens_per_second:.0f}", f"{row.speedup:.2f}")
        table.add_row(row.rule, row.shape, *figures)
    return table


def costs_table(costs: dict[str, float]) -> Table:
    """For `rich.print`."""
    table = Table("step of the target alone", "× greedy")
    for name, ratio in costs.items():
        table.add_row(name, f"{ratio:.3f}")
    return table


if __name__ == "__main__":
    main()
