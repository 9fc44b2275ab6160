"""Sizes of a step, and the few of them that are captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StepSizes(NamedTuple):
    """Sizes of a step: the lengths of its inputs of the same names. More than is wanted only makes inert tail.

    Attributes:
        token_range: T, packed tokens.
        logit_range: R, packed tokens whose logits are read.
        draft_range: S, packed tokens that a drafter with a model of its own reads.
        row_range: most packed tokens of one row.
    """

    token_range: int
    logit_range: int
    draft_range: int
    row_range: int

    def covers(self, other: StepSizes) -> bool:
        """Whether a step of these sizes can do the work of a step of the `other`."""
        return all(have >= need for have, need in zip(self, other, strict=True))


def decode_buckets(num_rows: int, num_draft_tokens: int) -> tuple[StepSizes, ...]:
    """Sizes, ascending, that cover every step in which all rows decode.

    T is 1, 2, 3, 4, 6, 8, 12, ... (at most half more than is wanted) and last what all rows want, B * (K + 1). R is T,
    so that no choice of tokens can want more logits. A row that decodes leaves a drafter two tokens to read.

    Args:
        num_rows: B.
        num_draft_tokens: K.
    """
    most = num_rows * (num_draft_tokens + 1)
    steps = {factor << power for power in range(most.bit_length()) for factor in (1, 3)}
    tokens = sorted({most, *(size for size in steps if size < most)})
    return tuple(StepSizes(size, size, 2 * min(size, num_rows), num_draft_tokens + 1) for size in tokens)


def smallest_cover(buckets: Sequence[StepSizes], sizes: StepSizes) -> StepSizes | None:
    """The first of the ascending `buckets` that covers `sizes`; None if none does."""
    return next((bucket for bucket in buckets if bucket.covers(sizes)), None)
