"""Whether a draft model's tokens are the target's."""

from __future__ import annotations

from emssd_compile.errors import DrafterError

MOST_PADDING, MOST_PADDING_SHARE = 512, 0.01
"""Vocabularies that differ by less than so many tokens, and by no more than this share of the larger one, are taken to
differ by padding: what pads an embedding is 8 to 512 rows that no tokenizer gives out."""


def difference(own: int, target: int) -> int:
    """By how many tokens the vocabularies of a draft model and its target differ: 0, or what pads one of them.

    Raises:
        DrafterError: they differ by more than padding.
    """
    tokens = abs(own - target)
    if tokens >= MOST_PADDING or tokens > MOST_PADDING_SHARE * max(own, target):
        raise DrafterError(
            f"the draft model predicts {own} tokens and the target {target}, which differ by more than padding: drafts "
            "would mean other tokens; use a model that shares the target's tokenizer"
        )
    return tokens
