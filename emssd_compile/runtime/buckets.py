"""Sizes of a step, and the few of them that are captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from emssd_compile.step.drafting import most_unread


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


def decode_sizes(tokens: int, num_rows: int, num_draft_tokens: int, max_depth: int | None) -> StepSizes:
    """Sizes of a step of so many packed tokens in which rows decode, whatever they choose to verify.

    R is T, so that no choice of tokens can want more logits.

    Args:
        tokens: T.
        num_rows: B.
        num_draft_tokens: K.
        max_depth: D, where drafts are trees; None for chains.
    """
    reading = most_unread(max_depth) * min(tokens, num_rows)
    return StepSizes(tokens, tokens, reading, num_draft_tokens + 1)


def decode_buckets(num_rows: int, num_draft_tokens: int, max_depth: int | None = None) -> tuple[StepSizes, ...]:
    """Sizes, ascending, that cover every step in which all rows decode.

    T is 1, 2, 3, 4, 6, 8, 12, ... (at most half more than is wanted) and last what all rows want, B * (K + 1).

    Args:
        num_rows: B.
        num_draft_tokens: K.
        max_depth: D, where drafts are trees; None for chains.
    """
    most = num_rows * (num_draft_tokens + 1)
    steps = {factor << power for power in range(most.bit_length()) for factor in (1, 3)}
    tokens = sorted({most, *(size for size in steps if size < most)})
    return tuple(decode_sizes(size, num_rows, num_draft_tokens, max_depth) for size in tokens)


def smallest_cover(buckets: Sequence[StepSizes], sizes: StepSizes) -> StepSizes | None:
    """The first of the ascending `buckets` that covers `sizes`; None if none does."""
    return next((bucket for bucket in buckets if bucket.covers(sizes)), None)
