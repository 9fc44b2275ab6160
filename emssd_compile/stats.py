"""What decoding did, in numbers."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from html import escape

_CHANGING = threading.Lock()  # one for all stats: it is held briefly, and a lock in each could not be copied


@dataclass
class Stats:
    """Sums over every `generate` since `reset`, those included that were broken off.

    They are counted on the device, and read once, at the end of each call.

    Attributes:
        num_steps: launches of the step graph.
        num_row_steps: (row, step) pairs in which a row that had read its prompt emitted tokens.
        num_spec_steps: those of them that verified at least one draft.
        num_draft_tokens: drafts verified.
        num_accepted_draft_tokens: drafts accepted and emitted.
        num_emitted_tokens: tokens emitted, those included that a stopping criterion dropped afterwards.
        num_fed_tokens: tokens of rows that went through the model.
        num_padding_tokens: tokens that went through the model for nobody, at the end of steps that were larger than
            needed: a size that was measured to be faster (`layout="auto"`), one that is captured, or a padded one.
        num_shared_blocks: blocks of keys and values that a request did not have to take, since another one had read
            them (`memory="paged"`).
        prefix_cache_queries: tokens of prompts that were looked for among what others had read (`memory="paged"`).
        prefix_cache_hits: those of them that were found, and so were not read again.
        acceptance_histogram: element i is how many verifications accepted exactly i drafts.
        guarantee: what is promised of the tokens (`GUARANTEES` in `step/acceptance.py`): "tokens" or "distribution" by
            the acceptance rule, or "lossy", by it or by keys and values in 8 bits; not a count, and not reset.
    """

    num_steps: int = 0
    num_row_steps: int = 0
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_emitted_tokens: int = 0
    num_fed_tokens: int = 0
    num_padding_tokens: int = 0
    num_shared_blocks: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    guarantee: str = "tokens"

    @property
    def lossless(self) -> bool:
        """Whether the tokens follow the model's own distribution exactly."""
        return self.guarantee != "lossy"

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted drafts over drafts; 0 if none was made."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens emitted a row and step in decoding, the correction or bonus token included; at least 1."""
        return 1.0 + self.num_accepted_draft_tokens / self.num_row_steps if self.num_row_steps else 1.0

    def _repr_html_(self) -> str:
        """What a notebook shows of a cell's last value."""
        shown = {**asdict(self), "mean_acceptance_length": f"{self.mean_acceptance_length:.2f}"}
        shown["draft_acceptance_rate"] = f"{self.draft_acceptance_rate:.0%}"
        rows = "".join(f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>" for name, value in shown.items())
        return f"<table>{rows}</table>"

    def add(self, counters: dict[str, int], histogram: list[int]) -> None:
        """Add what a run counted."""
        with _CHANGING:
            for name, value in counters.items():
                setattr(self, name, getattr(self, name) + value)
            before = self.acceptance_histogram or [0] * len(histogram)
            self.acceptance_histogram = [a + b for a, b in zip(before, histogram, strict=True)]

    def reset(self) -> None:
        """Start from zero."""
        with _CHANGING:
            self.__init__(guarantee=self.guarantee)  # type: ignore[misc]
