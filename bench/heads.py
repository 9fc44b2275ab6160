"""What each drafter gets out of a model: tokens a step, tokens a second, and how many drafts it verifies for that.

    python -m bench.heads
    python -m bench.heads --batches 1 4 8 16 --json heads.json --plot heads.png
    python -m bench.heads --temperature 1 --draft-tokens 1
    python -m bench.heads --shape smollm2 --exit 20
    python -m bench.heads --model models/llama --heads models/llama-eagle3 --draft models/small
    python -m bench.heads --train-on texts/*.txt --train-tokens 100000

The demo model has its own draft model, of another its first layers are one; heads that are shipped with a model are in
`examples`. Of every other kind there is one that is untrained, and drafts nothing that is right, or is trained first on
a few texts: the table says so. All decode the same prompts without EOS, greedily, or drawing the same tokens by the
same seeds, which repeat less; runs alternate, prompts are read in each of them. `layout="auto"`, as in `optimize`: a
drafter that is not worth it is left out as far as the policy notices.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

import emssd_compile
from bench import plots, shapes
from bench.command import argument_parser, at_least, describe, hardware, make_console, parse, save, timed, versions
from bench.head_subjects import subjects
from bench.real_models import smollm2
from bench.timing import alternate, median_ratio
from emssd_compile import OptimizedModel
from emssd_compile.drafters import Drafter

SHIPPED = {"demo": shapes.DEMO_MODEL / "heads", shapes.SMOLLM2: shapes.DEMO_MODEL.with_name("smollm2_heads")}


def shipped_heads(shape: str) -> list[Path]:
    """Folders of the heads that are shipped for a model of that name."""
    return sorted(path for path in SHIPPED[shape].iterdir() if path.is_dir())


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        seconds: from prompts in to tokens out.
        num_tokens: new ones, all rows together.
        acceptance_length: tokens a row and step.
        num_verified: drafts that a row verifies in a step that drafts.
        tokens: new ones of each row.
    """

    seconds: float
    num_tokens: int
    acceptance_length: float
    num_verified: float
    tokens: list[list[int]]


@dataclass(frozen=True)
class Row:
    """A drafter at a batch size.

    Attributes:
        drafter: its name.
        weights: where they come from; whether they are trained.
        batch: rows.
        acceptance_length: tokens a row and step.
        tokens_per_second: of all rows, in the median.
        speedup: over decoding without drafts, in the median.
        num_slots: drafts that there is room for: a tree before branches that begin alike are one.
        num_proposed: drafts of a row in a step that drafts, and of a tree after that, if all of them are verified.
        num_verified: drafts that a row verifies in a step that drafts, in these runs.
        tokens_identical: whether all tokens are those of decoding without drafts.
    """

    drafter: str
    weights: str
    batch: int
    acceptance_length: float
    tokens_per_second: float
    speedup: float
    num_slots: int
    num_proposed: float
    num_verified: float
    tokens_identical: bool


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, measure, print, save, draw."""
    options = parse_arguments(arguments)
    console, model = make_console(), load(options)
    prompts = shapes.prompts_for(options.model)
    with console.status("compiling"):
        compared = subjects(model, options)
        compiled = {name: compile_with(model, each.make(), options) for name, each in compared.items()}
        proposed = {name: count_proposed(model, each.make(), prompts, options) for name, each in compared.items()}
    weights = {name: each.weights for name, each in compared.items()}
    title = f"{options.model.name if options.model else 'demo model'}, {options.backend}, layout {options.layout}, " + (
        f"temperature {options.temperature:g}" if options.temperature else "greedy"
    )
    rows: list[Row] = []
    for batch in options.batches:
        chosen = shapes.spread(prompts, batch)
        with console.status(f"decoding at batch {batch}"):
            decoded = partial(decode, prompts=chosen, tokens=options.tokens, how=_how(options))
            ways = {name: partial(decoded, fast) for name, fast in compiled.items()}
            measured = alternate(ways, options.repeats, options.least_seconds)
            rows += summed_up(compiled, weights, proposed, batch, measured)
        if options.json:
            save(options.json, "bench.heads", [{"title": title, "rows": [asdict(row) for row in rows]}])
    console.print(table(rows, title))
    console.print(f"{describe(hardware())}\n{describe(versions())}")
    if options.plot:
        names = list(compiled)
        lines = {name: {row.batch: row.speedup for row in rows if row.drafter == name} for name in names}
        lengths = {name: {row.batch: row.acceptance_length for row in rows if row.drafter == name} for name in names}
        panels = [plots.Panel("tokens/s, × no drafts", lines, level=1), plots.Panel("tokens a row and step", lengths)]
        plots.draw(options.plot, f"{title}; {describe(hardware())}", panels, x_label="rows", y_label="")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, repeats=3)
    number = at_least(1)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--shape", choices=SHIPPED, help="a model that heads are shipped for (default: demo)")
    target.add_argument("--model", type=Path, metavar="DIR", help="a model of transformers")
    parser.add_argument(
        "--draft", type=Path, metavar="DIR", help="its draft model (default: the demo's, or its first layers)"
    )
    parser.add_argument(
        "--heads", type=Path, nargs="*", metavar="DIR", help="checkpoints of heads (default: those shipped, or none)"
    )
    parser.add_argument(
        "--draft-tokens",
        type=number,
        nargs="+",
        default=[],
        metavar="K",
        help="chains of such lengths, too, from heads that draft chains: 'mlp K=1'",
    )
    parser.add_argument(
        "--exit", type=number, metavar="E", help="layers of the early exit and of such a draft model (default: half)"
    )
    parser.add_argument(
        "--train-on",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="train heads of kinds that are not given on these texts",
    )
    parser.add_argument(
        "--train-tokens", type=number, default=50_000, metavar="N", help="most tokens of them (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these drafters only")
    parser.add_argument("--batches", type=number, nargs="+", default=[1, 4, 8, 16], metavar="B", help="(%(default)s)")
    parser.add_argument("--tokens", type=number, default=96, help="new tokens of each row (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="to draw tokens at (default: greedy)")
    parser.add_argument("--least-seconds", type=float, default=0.0, help="measure at least so long a batch size")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--layout", choices=("auto", "packed"), default="auto")
    options = parse(parser, arguments)
    if options.heads is None:
        options.heads = [] if options.model else shipped_heads(options.shape or "demo")
    if options.shape == shapes.SMOLLM2:
        options.model = smollm2()
    return options


def load(options: argparse.Namespace) -> PreTrainedModel:
    """The model."""
    if options.model is None:
        return shapes.build("demo", options.device, options.dtype)
    return shapes.pretrained(options.model, options.device, options.dtype)


def compile_with(model: PreTrainedModel, drafter: str | Drafter, options: argparse.Namespace) -> OptimizedModel:
    """The model with a drafter."""
    length = min(1024, 512 + options.tokens)
    sizes = {"max_batch": max(options.batches), "max_length": length}
    fast = emssd_compile.optimize(model, drafter, backend=options.backend, layout=options.layout, **sizes)
    fast.warmup()
    return fast


def count_proposed(
    model: PreTrainedModel, drafter: str | Drafter, prompts: list[list[int]], options: argparse.Namespace
) -> float:
    """How many drafts a drafter proposes for a row, where the policy leaves out none."""
    count = min(4, max(options.batches))
    plainly = {**vars(options), "backend": "eager", "layout": "packed", "batches": [count]}
    fast = compile_with(model, drafter, argparse.Namespace(**plainly))
    return decode(fast, shapes.spread(prompts, count), options.tokens, _how(options)).num_verified


def _how(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `generate`."""
    return {"do_sample": True, "temperature": options.temperature, "top_k": 0} if options.temperature else {}


def decode(fast: OptimizedModel, prompts: list[list[int]], tokens: int, how: dict[str, Any]) -> Run:
    """Continue all prompts without EOS; every run has the same seeds."""
    fast.stats.reset()
    run: Callable[[], list[list[int]]] = partial(
        fast.generate, prompts, max_new_tokens=tokens, eos_token_id=[], seed=0, **how
    )
    found, seconds = timed(run, fast.device)
    stats = fast.stats
    verified = stats.num_draft_tokens / max(1, stats.num_spec_steps)
    new = [text[len(prompt) :] for text, prompt in zip(found, prompts, strict=True)]
    return Run(seconds, len(prompts) * tokens, stats.mean_acceptance_length, verified, new)


def summed_up(
    compiled: dict[str, OptimizedModel],
    weights: dict[str, str],
    proposed: dict[str, float],
    batch: int,
    runs: dict[str, list[Run]],
) -> list[Row]:
    """One row a drafter; each list begins with a warm-up, and the first one is without drafts."""
    alone = runs["none"]
    return [
        Row(
            name,
            weights[name],
            batch,
            statistics.mean(run.acceptance_length for run in timed_runs),
            statistics.median(run.num_tokens / run.seconds for run in timed_runs),
            median_ratio([run.seconds for run in alone[1:]], [run.seconds for run in timed_runs]),
            compiled[name].drafter.num_draft_tokens,
            proposed[name],
            statistics.mean(run.num_verified for run in timed_runs),
            all(run.tokens == alone[0].tokens for run in timed_runs),
        )
        for name, (_, *timed_runs) in runs.items()
    ]


def table(rows: Sequence[Row], title: str) -> Table:
    """For `rich`."""
    shown = Table(title=title)
    shown.add_column("drafter", no_wrap=True)
    shown.add_column("weights")
    for heading in ("rows", "tokens a step", "tokens/s", "× none", "room", "drafts", "verified", "tokens identical"):
        shown.add_column(heading, justify="right")
    for row in rows:
        figures = (f"{row.acceptance_length:.2f}", f"{row.tokens_per_second:.0f}", f"{row.speedup:.2f}")
        counts = (str(row.num_slots), f"{row.num_proposed:.1f}", f"{row.num_verified:.1f}")
        drafts = (*counts, "yes" if row.tokens_identical else "NO")
        shown.add_row(row.drafter, row.weights, str(row.batch), *figures, *drafts)
    return shown


if __name__ == "__main__":
    main()
