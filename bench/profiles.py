"""How often drafts are right: acceptance profiles, measured and published.

A profile is K probabilities: that draft i is right, given that the drafts before it in the step were.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

PAPER_TOKENS_PER_SECOND: dict[str, dict[int, int]] = {
    "greedy": {1: 79, 2: 137, 4: 257, 8: 469, 16: 775, 24: 936},
    "padded": {1: 313, 2: 442, 4: 582, 8: 641, 16: 641, 24: 616},
    "unpadded": {1: 313, 2: 481, 4: 729, 8: 1018, 16: 1264, 24: 1321},
}
"""EMS-SD, arXiv 2405.07542: OPT-6.7b, fp16, prompt lookup, by batch size; prefill excluded, on its GPU."""


def paper_speedup(way: str, batch: int) -> float | None:
    """Published speed-up of `"padded"` or `"unpadded"` over greedy decoding; `None` for a batch it does not have."""
    greedy = PAPER_TOKENS_PER_SECOND["greedy"].get(batch)
    return None if greedy is None else PAPER_TOKENS_PER_SECOND[way][batch] / greedy


def expected_emitted(profile: Sequence[float]) -> float:
    """Tokens a row emits in a step, in the mean: 1 + p1 + p1 p2 + ..."""
    return 1 + sum(itertools.accumulate(profile, lambda a, b: a * b))


def measured_profile(histogram: Sequence[int], num_row_steps: int) -> list[float]:
    """The profile of what `OptimizedModel.stats` counted.

    A step in which a row had no draft, or fewer than K, counts as one whose next draft was wrong: replaying the profile
    emits as many tokens a step as were measured.

    Args:
        histogram: `acceptance_histogram`, how many verifications accepted 0, 1, ..., K drafts.
        num_row_steps: decoding steps of all rows, those without a draft included.
    """
    at_least = [num_row_steps, *(sum(histogram[i:]) for i in range(1, len(histogram)))]
    return [after / before if before else 0.0 for before, after in itertools.pairwise(at_least)]


def constant_profile(emitted: float, num_draft_tokens: int) -> list[float]:
    """The profile of equal probabilities that emits `emitted` tokens a row and step, by bisection.

    Raises:
        ValueError: `emitted` is not between 1 and K + 1.
    """
    if not 1 <= emitted <= num_draft_tokens + 1:
        raise ValueError(f"{emitted} tokens a step cannot come of {num_draft_tokens} drafts")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_emitted([middle] * num_draft_tokens) < emitted else (low, middle)
    return [high] * num_draft_tokens


def paper_profile(num_draft_tokens: int) -> list[float]:
    """What the paper's batch 1 implies: each step emits at least as many tokens as it is faster than greedy decoding.

    A step that verifies costs no less than one that does not, so the paper's true acceptance was this or better.
    """
    return constant_profile(paper_speedup("unpadded", 1) or 1.0, num_draft_tokens)
