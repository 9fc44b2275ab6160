"""What part of a decoding step is drafting.

    python -m bench.draft_share --heads examples/demo_model/heads/recurrent
    python -m bench.draft_share --options length=4 --heads examples/demo_model/heads/recurrent --json draft_share.json

The same prompts are continued with a head and with a stand-in. That one has heard what the head drafted at each place
of each text and says it again, for free: its steps are the head's steps but for the drafting. Two runs that differ in
their number of tokens are subtracted, so prompts are left out; runs alternate, figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import emssd_compile
from bench import shapes
from bench.command import argument_parser, at_least, describe, hardware, make_console, parse, save, timed, versions
from bench.heads import shipped_heads
from bench.timing import alternate
from emssd_compile import OptimizedModel
from emssd_compile.drafters import Draft, DraftContext, Drafter, DraftHead, load_head
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.runtime.launch import Report

_CONTEXT = 512
_FEW = 4
"""New tokens of the run that is subtracted."""


@dataclass(frozen=True)
class Row:
    """One head at one batch size.

    Attributes:
        head: its name.
        batch: rows.
        num_verified: drafts that a row verifies in a step.
        step_seconds: of a step with the head.
        stand_in_seconds: of a step with the stand-in.
        share: of the step that is drafting.
    """

    head: str
    batch: int
    num_verified: float
    step_seconds: float
    stand_in_seconds: float
    share: float


class StandIn(Drafter):
    """Drafts what a head drafted where row b knew so many tokens.

    Args:
        head: what it stands in for: it has room for as many drafts and reads the same layers.
        rows, capacity: B and C.
    """

    any_rows = True

    def __init__(self, head: DraftHead, rows: int, capacity: int) -> None:
        super().__init__()
        self.num_draft_tokens, self.max_depth, self.taps = head.num_draft_tokens, head.max_depth, head.taps
        self.register_buffer("heard", torch.zeros(rows, capacity, 2 * self.num_draft_tokens + 1, dtype=torch.int64))
        self.heard: Tensor  # [B, C, 2 K + 1]: drafts, their parents, and how many they are

    def listen(self, fast: OptimizedModel, run: Callable[[], object]) -> None:
        """Note what the head drafts in the steps of a run."""
        launcher = fast._engine.launcher
        launch = launcher.launch

        def heard(sizes: StepSizes) -> Report:
            report, tensors = launch(sizes), launcher.tensors
            parents = tensors.get("draft_parents", torch.zeros_like(tensors["draft_tokens"]))
            drafts = torch.cat([tensors["draft_tokens"], parents, tensors["draft_lengths"][:, None]], 1)
            self.heard[torch.arange(len(drafts)), tensors["known"]] = drafts.to(self.heard.device)
            return report

        launcher.launch = heard  # type: ignore[method-assign]
        try:
            run()
        finally:
            launcher.launch = launch  # type: ignore[method-assign]

    def forward(self, context: DraftContext) -> Draft:
        """The same drafts."""
        rows = torch.arange(context.known.shape[0], device=context.known.device)
        count = self.num_draft_tokens
        tokens, parents, lengths = self.heard[rows, context.known].split([count, count, 1], 1)
        return Draft(tokens, lengths.squeeze(1), parents=None if self.max_depth is None else parents)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, measure, print, save."""
    options = parse_arguments(arguments)
    console, rows = make_console(), list[Row]()
    model = shapes.build("demo", options.device, options.dtype)
    for folder in options.heads:
        with console.status(f"compiling with {folder.name}"):
            head = load_head(folder, **dict(options.options))
            again = StandIn(head, max(options.batches), _CONTEXT + options.tokens)
            fast, stand_in = (compile_with(model, drafter, options) for drafter in (head, again))
        with console.status("decoding"):
            rows += [measure(folder.name, fast, stand_in, batch, options) for batch in options.batches]
    console.print(table(rows))
    console.print(f"{describe(hardware())}\n{describe(versions())}")
    if options.json:
        save(options.json, "bench.draft_share", [{"title": "share of drafting", "rows": [asdict(row) for row in rows]}])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, repeats=5)
    number = at_least(1)
    parser.add_argument(
        "--heads", type=Path, nargs="+", metavar="DIR", help="checkpoints of heads of the demo model (default: shipped)"
    )
    parser.add_argument(
        "--options", type=_option, nargs="+", default=[], metavar="NAME=N", help="of the heads, as in length=4"
    )
    parser.add_argument("--batches", type=number, nargs="+", default=[1, 8], metavar="B", help="(%(default)s)")
    parser.add_argument("--tokens", type=at_least(_FEW + 1), default=64, help="new tokens of a row (%(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    options = parse(parser, arguments)
    options.heads = options.heads or shipped_heads("demo")
    return options


def _option(given: str) -> tuple[str, int]:
    name, _, value = given.partition("=")
    return name, int(value)


def compile_with(model: PreTrainedModel, drafter: Drafter, options: argparse.Namespace) -> OptimizedModel:
    """All drafts are verified."""
    sizes = {"max_batch": max(options.batches), "max_length": _CONTEXT + options.tokens}
    fast = emssd_compile.optimize(model, drafter, backend=options.backend, layout="packed", **sizes)
    fast.warmup()
    return fast


def measure(name: str, fast: OptimizedModel, stand_in: OptimizedModel, batch: int, options: argparse.Namespace) -> Row:
    """A head and its stand-in at one batch size."""
    prompts = shapes.spread(shapes.demo_prompts(), batch)
    assert isinstance(stand_in.drafter, StandIn)
    stand_in.drafter.listen(fast, partial(step_seconds, fast, prompts, options.tokens))
    drafted = fast.stats
    step_seconds(stand_in, prompts, options.tokens)
    if stand_in.stats != drafted:
        raise RuntimeError(f"the stand-in's steps are not those of {name}: {stand_in.stats} instead of {drafted}")
    verified = drafted.num_draft_tokens / drafted.num_spec_steps
    ways = {each: partial(step_seconds, each, prompts, options.tokens) for each in (fast, stand_in)}
    took, without = (statistics.median(each[1:]) for each in alternate(ways, options.repeats).values())
    return Row(name, batch, verified, took, without, 1 - without / took)


def step_seconds(fast: OptimizedModel, prompts: list[list[int]], tokens: int) -> float:
    """Of a step behind the prompts."""
    seconds, steps = list[float](), list[int]()
    for count in (_FEW, tokens):
        fast.stats.reset()
        run = partial(fast.generate, prompts, max_new_tokens=count, eos_token_id=[])
        seconds.append(timed(run, fast.device)[1])
        steps.append(fast.stats.num_steps)
    return (seconds[1] - seconds[0]) / (steps[1] - steps[0])


def table(rows: Sequence[Row]) -> Table:
    """For `rich`."""
    shown = Table(title="share of drafting in a step, demo model")
    for heading in ("head", "rows", "verified", "step ms", "with a stand-in", "drafting"):
        shown.add_column(heading, justify="left" if heading == "head" else "right")
    for row in rows:
        times = (f"{1e3 * seconds:.2f}" for seconds in (row.step_seconds, row.stand_in_seconds))
        shown.add_row(row.head, str(row.batch), f"{row.num_verified:.1f}", *times, f"{row.share:.0%}")
    return shown


if __name__ == "__main__":
    main()
