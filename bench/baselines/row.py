"""One row of a speculative baseline: what it feeds next, and which of its drafts it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.baselines.common import cut_after_stop


class RowDrafter(Protocol):
    """Drafts for one row. Wrong drafts cost time, never tokens."""

    def extend(self, tokens: Sequence[int], /) -> None:
        """Learns the tokens that the row emitted."""

    def draft(self, limit: int, /) -> list[int]:
        """At most `limit` guesses of what follows, possibly none."""


@dataclass
class Row:
    """One sample: what it emitted, and whether it has ended."""

    drafter: RowDrafter
    prompt_length: int
    max_new_tokens: int
    stop: frozenset[int]
    emitted: list[int] = field(default_factory=list)
    finished: bool = False
    num_steps: int = 0
    num_drafts: int = 0
    num_accepted: int = 0

    def next_input(self, num_draft_tokens: int) -> list[int]:
        """The newest token, whose KV is not written yet, and its drafts; nothing if the row is finished."""
        if self.finished:
            return []
        remaining = self.max_new_tokens - len(self.emitted)
        drafts = self.drafter.draft(min(num_draft_tokens, remaining - 1))  # one more is emitted than accepted
        self.num_steps += 1
        self.num_drafts += len(drafts)
        return [self.emitted[-1], *drafts]

    def accept(self, drafts: list[int], predicted: list[int]) -> int:
        """Emits predictions up to the first that differs from its draft, or up to the bonus token; returns how many."""
        agrees = [draft == prediction for draft, prediction in zip(drafts, predicted, strict=False)]
        num_agreeing = [*agrees, False].index(False)
        new = cut_after_stop(predicted[: num_agreeing + 1], self.stop)
        self.emitted += new
        self.num_accepted += min(num_agreeing, len(new))
        self.drafter.extend(new)
        self.finished = new[-1] in self.stop or len(self.emitted) >= self.max_new_tokens
        return len(new)
