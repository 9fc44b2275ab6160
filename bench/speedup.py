"""Tokens per second of every way to decode, side by side in one process.

    python -m bench.speedup
    python -m bench.speedup --batches 1 8 --candidates hf_generate ours_packed ours_auto --json speedup.json
    python -m bench.speedup --device cuda --shape opt-6.7b --plot speedup.png

Every row emits exactly `--tokens` tokens (no EOS). Candidates alternate; figures are medians, and the ratio of two
candidates is the median of the ratios within a repeat. The time to read the prompts, up to each row's first token, is
measured by runs for one token, which alternate with the others. Each candidate's tokens are compared with the model's
own greedy decoding of each prompt alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from functools import partial

from rich.progress import Progress
from transformers import PreTrainedModel

from bench import command, shapes, speedup_report
from bench.baselines import hf_generate
from bench.baselines.common import BaselineResult
from bench.candidates import CANDIDATES, Attempt, Task
from bench.figures import Figures, Phase
from bench.timing import alternate

DEFAULT_CANDIDATES = [name for name in CANDIDATES if name not in {"ours_draft_model", "ours_int8_kv"}]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, time, print, save, plot; returns 1 if a candidate got a token wrong in float32."""
    options = parse_arguments(arguments)
    console = command.make_console()
    prompts = shapes.prompts(options.shape)
    tables: dict[int, list[Figures]] = {}
    with command.make_progress(console) as progress:
        attempts, expected = prepare(options, prompts, progress)
        for batch in options.batches:
            chosen = shapes.spread(range(len(prompts)), batch)
            rows, right = [prompts[i] for i in chosen], [expected[i] for i in chosen]
            tables[batch] = measure(attempts, rows, right, options, progress)
            speedup_report.show(console, batch, tables[batch], options)
            if options.json:
                speedup_report.save(tables, options)
    if options.plot:
        speedup_report.plot(tables, options)
    wrong = any(row.failure is None and not row.identical for rows in tables.values() for row in rows)
    return int(wrong and speedup_report.is_exact(options))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.argument_parser(__doc__, least_seconds=60)
    number = command.at_least(1)
    parser.add_argument("--shape", choices=shapes.NAMES, default="demo", help="model (default: %(default)s)")
    parser.add_argument(
        "--candidates",
        choices=CANDIDATES,
        nargs="+",
        default=DEFAULT_CANDIDATES,
        metavar="NAME",
        help=f"of {', '.join(CANDIDATES)} (default: all but ours_draft_model and ours_int8_kv)",
    )
    parser.add_argument(
        "--batches", type=number, nargs="+", default=[1, 2, 4, 8, 16, 24], metavar="B", help="rows (%(default)s)"
    )
    parser.add_argument("--tokens", type=command.at_least(2), default=128, help="new tokens a row (%(default)s)")
    parser.add_argument("--lookup-tokens", type=number, default=7, help="K of every prompt lookup (%(default)s)")
    parser.add_argument("--max-ngram", type=number, default=3, help="longest suffix they match (%(default)s)")
    parser.add_argument("--draft-tokens", type=number, default=4, help="K of the draft model (%(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor", help="ours (%(default)s)")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="leave a candidate out of larger batches when a run takes longer than this",
    )
    options = command.parse(parser, arguments)
    options.batches = sorted(set(options.batches))
    return options


def prepare(
    options: argparse.Namespace, prompts: list[list[int]], progress: Progress
) -> tuple[dict[str, Attempt], dict[int, list[int]]]:
    """The candidates by name, and the right new tokens of each prompt that some batch needs, by its index."""
    model = shapes.build(options.shape, options.device, options.dtype)
    draft = shapes.build("demo-draft", options.device, options.dtype) if options.shape == "demo" else None
    task = Task(
        model,
        draft,
        max_batch=max(options.batches),
        max_length=max(map(len, prompts)) + options.tokens,
        lookup_tokens=options.lookup_tokens,
        max_ngram=options.max_ngram,
        draft_tokens=options.draft_tokens,
        backend=options.backend,
    )
    attempts = {
        name: Attempt(partial(CANDIDATES[name], task))
        for name in progress.track(options.candidates, description="compiling")
    }
    needed = sorted({index for batch in options.batches for index in shapes.spread(range(len(prompts)), batch)})
    expected = {
        index: alone(model, prompts[index], options.tokens)
        for index in progress.track(needed, description="decoding each prompt alone, for comparison")
    }
    return attempts, expected


def alone(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """The model's own greedy continuation of a prompt."""
    return hf_generate.run(model, [prompt], max_new_tokens=tokens).tokens[0]


def measure(
    attempts: dict[str, Attempt],
    prompts: list[list[int]],
    expected: list[list[int]],
    options: argparse.Namespace,
    progress: Progress,
) -> list[Figures]:
    """All candidates at one batch size."""
    least = 2 * len(attempts) * (1 + options.repeats)
    bar = progress.add_task(f"timing batch {len(prompts)}", total=least)
    done = itertools.count(1)

    def run(attempt: Attempt, tokens: int) -> BaselineResult | None:
        result = attempt(prompts, max_new_tokens=tokens)
        progress.update(bar, completed=(count := next(done)), total=max(least, count + 1))
        return result

    candidates = {
        (name, tokens): partial(run, attempt, tokens)
        for name, attempt in attempts.items()
        for tokens in (options.tokens, 1)
    }
    runs = alternate(candidates, options.repeats, options.least_seconds)
    progress.remove_task(bar)
    figures = []
    for name, attempt in attempts.items():
        totals, prefills = ([run for run in runs[name, tokens] if run] for tokens in (options.tokens, 1))
        if attempt.failure is not None:
            figures.append(Figures(name, len(prompts), failure=attempt.failure))
            continue
        figures.append(Figures.of(name, totals, prefills, expected))
        seconds = figures[-1].seconds(Phase.TOTAL)
        if options.time_limit is not None and seconds > options.time_limit:
            attempt.give_up(f"batch {len(prompts)} took {seconds:.1f} s a run, more than --time-limit")
    return figures


if __name__ == "__main__":
    sys.exit(main())
