"""Everything that needs a GPU, in one command: exactness, kernels, synchronisations, tables, tests, artifacts.

    python -m bench.gpu_suite --json gpu_suite.json
    python -m bench.gpu_suite --smoke --json smoke.json

Each part runs in a process of its own with a time limit; whatever fails is recorded with the end of its output, and the
others go on. The file is written anew after each part. The exit code is 1 if a part failed, hung or found no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.command import at_least, describe, hardware, make_console, save, versions
from bench.gpu_suite.parts import PARTS, Part
from bench.gpu_suite.runner import Outcome, run_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, record, sum up; returns the exit code."""
    options = parse_arguments(arguments)
    console = make_console()
    outcomes: list[Outcome] = []
    for outcome in run_all(choose(options), options.limit):
        outcomes.append(outcome)
        save(options.json, "bench.gpu_suite", [], smoke=options.smoke, parts=[asdict(o) for o in outcomes])
        show(console, outcome)
    console.print(summary(outcomes))
    return int(not all(outcome.good for outcome in outcomes))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="PATH", help="where the record goes")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU if there is no GPU")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these; a word of the name is enough")
    parser.add_argument(
        "--limit",
        type=at_least(1),
        default=530,
        metavar="SECONDS",
        help="for all parts together (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA GPU here; --smoke runs toy sizes on the CPU")
    return options


def choose(options: argparse.Namespace) -> list[Part]:
    """The parts asked for, in the suite's order."""
    parts = PARTS[options.smoke]("cuda" if torch.cuda.is_available() else "cpu")
    if not options.parts:
        return parts
    unknown = [word for word in options.parts if not any(word in part.name for part in parts)]
    if unknown:
        sys.exit(f"no part is called {', '.join(unknown)}; there are: {', '.join(part.name for part in parts)}")
    return [part for part in parts if any(word in part.name for word in options.parts)]


def show(console: Console, outcome: Outcome) -> None:
    """A part's last lines."""
    console.rule(f"{outcome.name}: {outcome.status} after {outcome.seconds:.0f} s")
    for line in outcome.output_tail:
        console.print(line, markup=False, highlight=False)


def summary(outcomes: Sequence[Outcome]) -> Table:
    """One line a part."""
    shown = Table(title="GPU suite", caption=f"{describe(hardware())}\n{describe(versions())}")
    shown.add_column("part")
    shown.add_column("status")
    shown.add_column("seconds", justify="right")
    shown.add_column("last line")
    for outcome in outcomes:
        last = (outcome.output_tail or [""])[-1].strip()
        shown.add_row(outcome.name, outcome.status, f"{outcome.seconds:.0f}", "" if outcome.good else last)
    return shown


if __name__ == "__main__":
    sys.exit(main())
