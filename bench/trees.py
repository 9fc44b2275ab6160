"""What it costs to verify a tree of drafts rather than a chain of as many.

    python -m bench.trees
    python -m bench.trees --model models/smollm2 --tree 4 2 2 --batches 1 8 --json trees.json

The drafts are made of nothing and wrong, so that each step verifies all of them and emits one token a row. Steps of the
two alternate; a ratio is the median of those within a repeat.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from transformers import PreTrainedModel

import emssd_compile
from bench import shapes
from bench.command import argument_parser, at_least, describe, hardware, make_console, parse, save, versions
from bench.measure import steady_step
from bench.timing import alternate, median_ratio
from emssd_compile import OptimizedModel
from emssd_compile.drafters import Draft, DraftContext, Drafter
from emssd_compile.drafters.tree_shape import TreeShape
from emssd_compile.step.drafting import Target


class Rubbish(Drafter):
    """Drafts the last token of the vocabulary, in a chain or in a tree of a shape.

    Args:
        shape: of the tree.
        is_chain: whether as many drafts are a chain.
    """

    def __init__(self, shape: TreeShape, *, is_chain: bool) -> None:
        super().__init__()
        self.shape, self.token = shape, 0
        self.num_draft_tokens = shape.num_nodes
        self.max_depth = None if is_chain else shape.depth

    def prepare(self, target: Target) -> None:
        """See how large the vocabulary is."""
        self.token = target.vocabulary - 1

    def forward(self, context: DraftContext) -> Draft:
        """Tokens `[B, K]`, and the parents of a tree."""
        rows = len(context.known)
        tokens = torch.full((rows, self.num_draft_tokens), self.token, device=context.known.device)
        lengths = torch.full_like(context.known, self.num_draft_tokens)
        parents = None if self.max_depth is None else self.shape.parents(tokens.device).expand(rows, -1)
        return Draft(tokens, lengths, parents=parents)


@dataclass(frozen=True)
class Row:
    """One batch size.

    Attributes:
        batch: rows.
        nodes: tokens that each of them verifies in a step.
        plain_seconds, chain_seconds, tree_seconds: of a step without drafts, with a chain and with a tree.
        tree_over_chain: ratio of the latter.
    """

    batch: int
    nodes: int
    plain_seconds: float
    chain_seconds: float
    tree_seconds: float
    tree_over_chain: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, time, print, save."""
    options = parse_arguments(arguments)
    console, shape = make_console(), options.shape
    model = load(options)
    with console.status("compiling"):
        compiled = {
            "plain": compile_with(model, "none", options),
            "chain": compile_with(model, Rubbish(shape, is_chain=True), options),
            "tree": compile_with(model, Rubbish(shape, is_chain=False), options),
        }
    with console.status("timing"):
        rows = [measure(compiled, batch, shape.num_nodes + 1, options) for batch in options.batches]
    title = f"{options.model or 'demo model'}, trees of {shape.branching}, {options.context} tokens of context"
    console.print(table(rows, title))
    console.print(f"{describe(hardware())}\n{describe(versions())}")
    if options.json:
        save(options.json, "bench.trees", [{"title": title, "rows": [asdict(row) for row in rows]}])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, repeats=9)
    number = at_least(1)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model of transformers (default: the demo's)")
    parser.add_argument("--tree", type=number, nargs="+", default=[2, 2, 2], metavar="W", help="(default: %(default)s)")
    parser.add_argument("--batches", type=number, nargs="+", default=[1, 8], metavar="B", help="rows (%(default)s)")
    parser.add_argument("--context", type=number, default=200, help="tokens of each row (default: %(default)s)")
    parser.add_argument("--steps", type=number, default=48, help="in a run (default: %(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    options = parse(parser, arguments)
    options.shape = TreeShape.of("--tree", options.tree)
    return options


def load(options: argparse.Namespace) -> PreTrainedModel:
    """The model."""
    if options.model is None:
        return shapes.build("demo", options.device, options.dtype)
    return shapes.pretrained(options.model, options.device, options.dtype)


def compile_with(model: PreTrainedModel, drafter: str | Drafter, options: argparse.Namespace) -> OptimizedModel:
    """The model, all drafts verified."""
    length = options.context + 2 * (options.shape.num_nodes + 2) + options.steps
    fast = emssd_compile.optimize(
        model, drafter, max_batch=max(options.batches), max_length=length, layout="packed", backend=options.backend
    )
    fast.warmup()
    return fast


def measure(compiled: dict[str, OptimizedModel], batch: int, nodes: int, options: argparse.Namespace) -> Row:
    """One batch size."""
    ways = {name: partial(steady_step, fast, batch, options.context, options.steps) for name, fast in compiled.items()}
    runs = {name: [step.seconds for step in runs[1:]] for name, runs in alternate(ways, options.repeats).items()}
    plain, chain, tree = (statistics.median(runs[name]) for name in ("plain", "chain", "tree"))
    return Row(batch, nodes, plain, chain, tree, median_ratio(runs["tree"], runs["chain"]))


def table(rows: Sequence[Row], title: str) -> Table:
    """For `rich`."""
    shown = Table(title=title)
    for heading in ("rows", "nodes of each", "ms, no drafts", "ms, chain", "ms, tree", "tree / chain"):
        shown.add_column(heading, justify="right")
    for row in rows:
        seconds = (f"{1000 * s:.2f}" for s in (row.plain_seconds, row.chain_seconds, row.tree_seconds))
        shown.add_row(str(row.batch), str(row.nodes), *seconds, f"{row.tree_over_chain:.2f}")
    return shown


if __name__ == "__main__":
    main()
