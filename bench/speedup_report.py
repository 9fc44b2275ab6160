"""How `bench.speedup` shows, saves and draws its figures."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import command
from bench.figures import OURS, RATIOS, REFERENCE, Figures, Phase, ratios, speedup
from bench.plots import Panel, draw

PHASE_TITLES = {Phase.TOTAL: "prompts included", Phase.DECODE: "decoding only"}
COLUMNS = (
    "seconds (range)",
    "prefill s",
    "tokens/s",
    "×",
    "decode\ntokens/s",
    "×",
    "tokens a row\nand step",
    "padding\ntokens",
)
Tables = dict[int, list[Figures]]
"""The candidates by batch size."""


def is_exact(options: argparse.Namespace) -> bool:
    """In float32 every token must be right; in half precision rounding may break a tie either way."""
    return options.dtype is torch.float32


def show(console: Console, batch: int, rows: list[Figures], options: argparse.Namespace) -> None:
    """Prints the table of a batch size, and the ratios that matter below it."""
    dtype = command.dtype_name(options.dtype)
    table = Table(
        title=f"{options.shape}, {dtype}, batch {batch}, {options.tokens} new tokens a row",
        caption=f"{command.describe(command.hardware())}\n{command.describe(command.versions())}",
    )
    table.add_column("candidate", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("tokens identical")
    reference = _find(rows, REFERENCE)
    for row in rows:
        table.add_row(row.name, *_cells(row, reference))
    console.print(table)
    found = {phase: ratios(rows, phase, exact=is_exact(options)) for phase in Phase}
    if any(found.values()):
        console.print(_ratio_table(found))
    if not is_exact(options):
        console.print(f"In {dtype} rounding may break a tie either way: rows may differ.", highlight=False)


def _cells(row: Figures, reference: Figures | None) -> list[str]:
    """The columns behind the candidate's name."""
    if row.failure is not None:
        return ["–"] * len(COLUMNS) + [f"[yellow]not timed: {escape(row.failure)}[/yellow]"]
    total = row.seconds(Phase.TOTAL)
    speeds = [
        "–" if value is None else f"{value:.{digits}f}"
        for phase in Phase
        for value, digits in ((row.tokens_per_second(phase), 0), (speedup(row, reference, phase), 2))
    ]
    return [
        f"{total:.3f} ({min(row.total_seconds):.3f}–{max(row.total_seconds):.3f})",
        f"{total - row.seconds(Phase.DECODE):.3f}",
        *speeds,
        f"{row.acceptance_length:.2f}",
        str(row.num_padding_tokens),
        "yes" if row.identical else f"[red]NO: {row.num_rows - row.num_identical} of {row.num_rows} rows differ[/red]",
    ]


def _ratio_table(found: dict[Phase, dict[str, float]]) -> Table:
    table = Table("ratio of tokens/s", title="ratios that matter")
    for phase in Phase:
        table.add_column(PHASE_TITLES[phase], justify="right")
    for name in RATIOS:
        values = [found[phase].get(name) for phase in Phase]
        if any(values):
            table.add_row(name, *("–" if value is None else f"{value:.2f}" for value in values))
    return table


def save(tables: Tables, options: argparse.Namespace) -> None:
    """Writes all tables to `--json`."""
    settings = ("shape", "tokens", "lookup_tokens", "max_ngram", "draft_tokens", "repeats", "least_seconds", "backend")
    command.save(
        options.json,
        "bench.speedup",
        [_record(batch, rows, options) for batch, rows in tables.items()],
        device=options.device.type,
        dtype=command.dtype_name(options.dtype),
        **{name: getattr(options, name) for name in settings},
    )


def _record(batch: int, rows: list[Figures], options: argparse.Namespace) -> dict[str, object]:
    reference = _find(rows, REFERENCE)
    found = {str(phase): ratios(rows, phase, exact=is_exact(options)) for phase in Phase}
    return {"batch": batch, "candidates": [row.record(reference) for row in rows], "ratios": found}


def plot(tables: Tables, options: argparse.Namespace) -> None:
    """Draws speed-ups at `--plot`, and tokens per second beside it, in a file whose name ends in `_tokens`."""
    gains = [Panel(PHASE_TITLES[phase], _lines(tables, phase, over=REFERENCE), level=1.0) for phase in Phase]
    speeds = [Panel(PHASE_TITLES[phase], _lines(tables, phase)) for phase in Phase]
    machine = command.hardware()
    if options.device.type == "cuda":
        machine = {"gpu": machine["gpu"]}
    title = (
        f"{options.shape}, {command.dtype_name(options.dtype)}, {options.tokens} new tokens a row\n"
        f"{command.describe(machine)}, torch {torch.__version__}"
    )
    beside = options.plot.with_stem(f"{options.plot.stem}_tokens")
    for path, panels, y_label in (
        (options.plot, gains, f"tokens/s over those of {REFERENCE}"),
        (beside, speeds, "tokens/s, all rows together"),
    ):
        draw(path, title, panels, x_label="batch size (rows)", y_label=y_label, highlight=OURS)


def _lines(tables: Tables, phase: Phase, over: str | None = None) -> dict[str, dict[int, float]]:
    """Tokens per second by batch size for each candidate, or their ratios to those of the candidate `over`."""
    lines: dict[str, dict[int, float]] = {}
    for batch, rows in tables.items():
        reference = _find(rows, over)
        for row in rows:
            if row is reference:
                continue
            value = speedup(row, reference, phase) if over else row.tokens_per_second(phase)
            if value is not None:
                lines.setdefault(row.name, {})[batch] = value
    return lines


def _find(rows: list[Figures], name: str | None) -> Figures | None:
    return next((row for row in rows if row.name == name), None)
