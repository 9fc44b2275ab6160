"""What `bench.speedup` says of a candidate, computed from the times of its runs and the tokens they gave."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from bench.baselines.common import BaselineResult
from bench.timing import median_ratio

REFERENCE = "hf_generate"
OURS = ("ours_none", "ours_packed", "ours_padded", "ours_auto", "ours_draft_model")
CHOICES_OF_AUTO = ("ours_none", "ours_packed", "ours_padded")
RATIOS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "best of ours / hf_generate": (OURS, ("hf_generate",)),
    "best of ours / hf_assisted": (OURS, ("hf_assisted",)),
    "ours_packed / vanilla_padded": (("ours_packed",), ("vanilla_padded",)),
    "ours_packed / ours_padded": (("ours_packed",), ("ours_padded",)),
    "ours_auto / best of ours_none, ours_packed, ours_padded": (("ours_auto",), CHOICES_OF_AUTO),
}
"""The ratios that matter: the best of some candidates over the best of others."""


class Phase(StrEnum):
    """Which part of a run a figure is about."""

    TOTAL = "total"
    """From prompts in to tokens out."""
    DECODE = "decode"
    """What comes after each row's first token: the time without that of a run for one token, and the other tokens."""


def _agreement(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> float:
    pairs = [list(zip(*each, strict=False)) for each in zip(found, wanted, strict=True)]
    agreeing = (sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], row)) for row in pairs)
    return sum(agreeing) / sum(map(len, wanted))


@dataclass(frozen=True)
class Figures:
    """One candidate at one batch size.

    Attributes:
        name: the candidate's.
        num_rows: B.
        num_tokens: new tokens of a run, all rows together.
        total_seconds: of each timed run.
        prefill_seconds: of each timed run for one new token a row: the prompts and the first token.
        acceptance_length: tokens emitted a row and step; 1 without speculation.
        num_padding_tokens: inputs of a run that were computed for no row.
        agreement: what part of the tokens stands before the first of a row that is not the model's own.
        num_identical: rows whose tokens were in every run those of the model's own decoding of the prompt alone.
        failure: why there are no figures; `None` where there are.
    """

    name: str
    num_rows: int
    num_tokens: int = 0
    total_seconds: list[float] = field(default_factory=list)
    prefill_seconds: list[float] = field(default_factory=list)
    acceptance_length: float = 0.0
    num_padding_tokens: int = 0
    agreement: float = 0.0
    num_identical: int = 0
    failure: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        runs: Sequence[BaselineResult],
        prefills: Sequence[BaselineResult],
        expected: Sequence[Sequence[int]],
    ) -> Figures:
        """The figures of runs of which the first was the warm-up.

        Args:
            name: the candidate's.
            runs: for all new tokens.
            prefills: for one new token a row.
            expected: new tokens of each row of `runs`, of the prompt alone.
        """
        wanted = [list(tokens) for tokens in expected]
        right = [
            all(run.tokens[b] == wanted[b] for run in runs) and all(run.tokens[b] == wanted[b][:1] for run in prefills)
            for b in range(len(wanted))
        ]
        stats = runs[-1].stats
        return cls(
            name,
            num_rows=len(wanted),
            num_tokens=sum(map(len, runs[-1].tokens)),
            total_seconds=[run.seconds for run in runs[1:]],
            prefill_seconds=[run.seconds for run in prefills[1:]],
            acceptance_length=stats.get("mean_acceptance_length", 1.0),
            num_padding_tokens=int(stats.get("num_padding_tokens", 0)),
            agreement=_agreement(runs[-1].tokens, wanted),
            num_identical=sum(right),
        )

    @property
    def identical(self) -> bool:
        """All rows got the right tokens in every run."""
        return self.failure is None and self.num_identical == self.num_rows

    def seconds(self, phase: Phase) -> float:
        """Median seconds of that part of a run."""
        total = statistics.median(self.total_seconds)
        return total if phase is Phase.TOTAL else total - statistics.median(self.prefill_seconds)

    def repeats(self, phase: Phase) -> list[float]:
        """Seconds of that part of each run."""
        if phase is Phase.TOTAL:
            return self.total_seconds
        return [total - prefill for total, prefill in zip(self.total_seconds, self.prefill_seconds, strict=True)]

    def tokens_per_second(self, phase: Phase) -> float | None:
        """Of all rows together; `None` where there is nothing to divide, or no time that rises above the noise."""
        if self.failure is not None:
            return None
        tokens = self.num_tokens if phase is Phase.TOTAL else self.num_tokens - self.num_rows
        seconds = self.seconds(phase)
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    def record(self, reference: Figures | None) -> dict[str, object]:
        """Everything, for JSON; speed-ups are over `reference`."""
        record: dict[str, object] = {"candidate": self.name, "failure": self.failure}
        if self.failure is not None:
            return record
        for phase in Phase:
            record[f"{phase}_tokens_per_second"] = self.tokens_per_second(phase)
            record[f"{phase}_speedup"] = speedup(self, reference, phase)
        return record | {
            "tokens_identical": self.identical,
            "num_identical_rows": self.num_identical,
            "acceptance_length": self.acceptance_length,
            "num_padding_tokens": self.num_padding_tokens,
            "median_total_seconds": self.seconds(Phase.TOTAL),
            "median_prefill_seconds": statistics.median(self.prefill_seconds),
            "total_seconds": self.total_seconds,
            "prefill_seconds": self.prefill_seconds,
        }


def speedup(candidate: Figures, reference: Figures | None, phase: Phase) -> float | None:
    """Tokens per second over the reference's; `None` if one of them has none."""
    mine = candidate.tokens_per_second(phase)
    its = reference.tokens_per_second(phase) if reference else None
    return mine / its if mine and its else None


def ratios(rows: Iterable[Figures], phase: Phase, *, exact: bool) -> dict[str, float]:
    """Those of `RATIOS` for which there are figures, by name: medians of the ratios within a repeat.

    Within a repeat, since the speed of a machine drifts: what runs at about the same time is compared.

    Args:
        rows: the candidates at one batch size, timed in the same repeats.
        phase: the part of a run whose tokens per second are compared.
        exact: leave out a candidate whose tokens are not all right. In half precision a tie may break either way, and
            they need not be.
    """
    known = {row.name: row for row in rows if row.tokens_per_second(phase) and (row.identical or not exact)}
    found = {}
    for name, (ours, theirs) in RATIOS.items():
        best, other = _best(known, ours, phase), _best(known, theirs, phase)
        value = best and other and _ratio(best, other, phase)
        if value:
            found[name] = value
    return found


def _best(known: Mapping[str, Figures], names: Sequence[str], phase: Phase) -> Figures | None:
    """The fastest of the candidates of these names."""
    rows = (known[name] for name in names if name in known)
    return max(rows, key=lambda row: row.tokens_per_second(phase) or 0.0, default=None)


def _ratio(one: Figures, other: Figures, phase: Phase) -> float | None:
    """Tokens per second of one over the other's, the median over the repeats; both have the same number of tokens."""
    pairs = [pair for pair in zip(other.repeats(phase), one.repeats(phase), strict=True) if min(pair) > 0]
    return median_ratio(*zip(*pairs, strict=True)) if pairs else None
