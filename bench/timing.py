"""Times candidates side by side: alternating repeats, medians, ratios, and on which machine."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from rich.table import Table

from bench.command import Facts, describe, hardware, versions

Name = TypeVar("Name", bound=Hashable)
Outcome = TypeVar("Outcome")


class Result(Protocol):
    """What a candidate returns: `BaselineResult` is one."""

    @property
    def tokens(self) -> list[list[int]]:
        """New tokens of each row."""

    @property
    def seconds(self) -> float:
        """Wall time of the work."""


@dataclass(frozen=True)
class Timing:
    """One candidate's repeats.

    Args:
        name: as given to `compare`.
        seconds: wall time of each repeat, in order.
        num_tokens: new tokens of one run, all rows together.
        speedup: median over the repeats of the first candidate's seconds divided by this one's in the same repeat.
        tokens_identical: every run emitted exactly the tokens of the first candidate's first run.
    """

    name: str
    seconds: list[float]
    num_tokens: int
    speedup: float
    tokens_identical: bool

    @property
    def median_seconds(self) -> float:
        """Median of `seconds`."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Timings of candidates that ran side by side, the reference first, and the machine and versions they ran on."""

    timings: list[Timing]
    hardware: Facts

    def table(self, title: str | None = None) -> Table:
        """For `rich.print`; the caption says on what hardware and versions."""
        table = Table(title=title, caption=describe(self.hardware))
        table.add_column("candidate", no_wrap=True)
        for heading in ("seconds", "range", "tokens/s", f"× {self.timings[0].name}", "tokens identical"):
            table.add_column(heading, justify="right")
        for timing in self.timings:
            table.add_row(
                timing.name,
                f"{timing.median_seconds:.3f}",
                f"{min(timing.seconds):.3f}–{max(timing.seconds):.3f}",
                f"{timing.num_tokens / timing.median_seconds:.1f}",
                f"{timing.speedup:.2f}",
                "yes" if timing.tokens_identical else "NO",
            )
        return table

    def save(self, path: Path, **context: object) -> None:
        """Writes everything as JSON; `context` says what was run (model, batch size, ...)."""
        path.write_text(json.dumps({**context, **asdict(self)}, indent=2) + "\n")


def compare(candidates: Mapping[str, Callable[[], Result]], repeats: int = 5) -> Comparison:
    """Times candidates that decode the same batch; see `alternate`. Ratios are taken within a repeat.

    Args:
        candidates: by name; the first is the reference of the ratios and of the tokens.
        repeats: timed runs of each.

    Raises:
        ValueError: there is no candidate, or `repeats` is not positive.
    """
    runs = alternate(candidates, repeats)
    reference = next(iter(runs.values()))
    return Comparison([_timing(name, run, reference) for name, run in runs.items()], hardware() | versions())


def alternate(
    candidates: Mapping[Name, Callable[[], Outcome]], repeats: int, least_seconds: float = 0.0
) -> dict[Name, list[Outcome]]:
    """Runs every candidate once to warm up, then `repeats` times in turn, and on until `least_seconds` have passed.

    Candidates alternate within a repeat, in the opposite order every second time: a machine that slows down slows all
    of them. Short runs scatter most, and in the same time there are more of them.

    Returns:
        What each candidate returned, the warm-up first.

    Raises:
        ValueError: there is no candidate, or `repeats` is not positive.
    """
    if not candidates or repeats < 1:
        raise ValueError(f"nothing to time: {len(candidates)} candidates, {repeats} repeats")
    names = list(candidates)
    runs = {name: [candidates[name]()] for name in names}
    started = time.perf_counter()
    for repeat in itertools.count():
        if repeat >= repeats and time.perf_counter() - started >= least_seconds:
            break
        for name in names if repeat % 2 == 0 else reversed(names):
            runs[name].append(candidates[name]())
    return runs


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median over the repeats of one candidate's seconds over another's in the same repeat."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def _timing(name: str, runs: list[Result], reference: list[Result]) -> Timing:
    """Sums up `runs`, of which the first was the warm-up."""
    return Timing(
        name=name,
        seconds=[run.seconds for run in runs[1:]],
        num_tokens=sum(map(len, runs[0].tokens)),
        speedup=median_ratio([base.seconds for base in reference[1:]], [run.seconds for run in runs[1:]]),
        tokens_identical=all(run.tokens == reference[0].tokens for run in runs),
    )
