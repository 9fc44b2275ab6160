"""Runs ways in turn, and compares what they emit and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Protocol

from rich.table import Table

from bench.peers.registry import OURS, REFERENCE, WAYS
from bench.peers.worker import Answer, WorkerError
from bench.timing import alternate, median_ratio


class Decoder(Protocol):
    """What a contender needs of its worker: `worker.Worker` is one."""

    version: str
    ready_seconds: float

    def decode(self, prompts: list[list[int]], new_tokens: int) -> Answer:
        """Greedy continuations by `new_tokens` tokens each. Raises WorkerError if there are none."""

    def close(self) -> None:
        """End it."""


@dataclass
class Contender:
    """A way that takes part until it fails.

    Attributes:
        name: of `WAYS`.
        failure: why it does not take part any more, or why it never did.
        ready_seconds: from the start of its process until it was ready: the first time, and the second.
    """

    name: str
    failure: str | None = None
    version: str | None = None
    ready_seconds: list[float] = field(default_factory=list)
    worker: Decoder | None = None

    def start(self, make: Callable[[], Decoder]) -> None:
        """Start it twice: the second time it finds what the first one kept."""
        try:
            for _ in range(2):
                self.close()
                self.worker = make()
                self.ready_seconds.append(self.worker.ready_seconds)
            self.version = self.worker.version if self.worker else None
        except WorkerError as error:
            self._fail(str(error))

    def decode(self, prompts: list[list[int]], new_tokens: int) -> Answer | None:
        """None if it fails or has failed."""
        if self.worker is None:
            return None
        try:
            answer = self.worker.decode(prompts, new_tokens)
        except WorkerError as error:
            self._fail(f"batch {len(prompts)}: {error}")
            return None
        counts = sorted({len(row) for row in answer.tokens})
        if len(answer.tokens) != len(prompts) or counts != [new_tokens]:
            wanted = f"{len(prompts)} rows of {new_tokens}"
            self._fail(f"batch {len(prompts)}: {len(answer.tokens)} rows of {counts} tokens, not {wanted}")
            return None
        return answer

    def close(self) -> None:
        """End its process."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.close()


@dataclass(frozen=True)
class Speed:
    """A way at a batch size.

    Attributes:
        way: its name.
        batch: rows.
        seconds: of each timed run.
        tokens_per_second: of all rows, prompts included, in the median run.
        over_reference: times the speed of `hf_generate`: the median of the ratios within a repeat.
        over_ours: times the speed of ours, of the same kind: plain, or with lookup.
        equal_rows: rows that got the tokens of plain decoding of ours; all runs count.
        peak: bytes of the most memory that its process had up to then.
    """

    way: str
    batch: int
    seconds: list[float]
    tokens_per_second: float
    over_reference: float | None
    over_ours: float | None
    equal_rows: int | None
    peak: int


def speeds(
    contenders: Sequence[Contender], prompts: list[list[int]], new_tokens: int, repeats: int, least_seconds: float
) -> list[Speed]:
    """Those that did not fail, after a warm-up each, in turn."""
    taking_part = {each.name: partial(each.decode, prompts, new_tokens) for each in contenders if each.failure is None}
    if not taking_part:
        return []
    runs = alternate(taking_part, repeats, least_seconds)
    whole = {name: [run for run in each if run is not None] for name, each in runs.items() if None not in each}
    return [_speed(name, whole, new_tokens) for name in whole]


def _speed(name: str, runs: Mapping[str, list[Answer]], new_tokens: int) -> Speed:
    own, plain = runs[name], runs.get(OURS[False])
    seconds, rows = [run.seconds for run in own[1:]], len(own[0].tokens)
    equal = None
    if plain:
        equal = sum(all(run.tokens[row] == plain[0].tokens[row] for run in own) for row in range(rows))

    def over(other: str) -> float | None:
        return median_ratio([run.seconds for run in runs[other][1:]], seconds) if other in runs else None

    return Speed(
        way=name,
        batch=rows,
        seconds=seconds,
        tokens_per_second=rows * new_tokens / median(seconds),
        over_reference=over(REFERENCE),
        over_ours=over(OURS[WAYS[name].lookup]),
        equal_rows=equal,
        peak=own[-1].peak,
    )


def table(title: str, contenders: Sequence[Contender], figures: Sequence[Speed], batches: Sequence[int]) -> Table:
    """For `rich`: a way a line, and in a cell tokens/s (x hf_generate, x ours), rows equal to ours."""
    table = Table("way", *(f"batch {batch}" for batch in batches), "peak, MiB", "ready, s: first, again", "version")
    table.title = title
    table.caption = "tokens/s (x hf_generate, x ours), rows with the tokens of ours"
    by_place = {(each.way, each.batch): each for each in figures}
    for way in contenders:
        measured = [by_place.get((way.name, batch)) for batch in batches]
        cells = [_cell(each) for each in measured]
        peak = max((each.peak for each in measured if each), default=0)
        ready = ", ".join(f"{seconds:.1f}" for seconds in way.ready_seconds)
        table.add_row(way.name, *cells, f"{peak >> 20}" if peak else "", ready, way.failure or way.version)
    return table


def _cell(speed: Speed | None) -> str:
    if speed is None:
        return "–"
    ratios = ", ".join("–" if each is None else f"{each:.2f}" for each in (speed.over_reference, speed.over_ours))
    equal = "" if speed.equal_rows is None else f" {speed.equal_rows}/{speed.batch}"
    return f"{speed.tokens_per_second:.0f} ({ratios}){equal}"
