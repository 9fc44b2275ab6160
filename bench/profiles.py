"""How often drafts are there, and how often they are right: profiles, measured and published."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.baselines.prompt_lookup import PromptLookup

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


@dataclass(frozen=True)
class Profile:
    """What a drafter's steps are like.

    Attributes:
        right: K probabilities, of draft i being there and right, given that the drafts before it in the step were.
        drafted: K probabilities, of draft i being there at all, given that the drafts before it are, right or not.
    """

    right: tuple[float, ...]
    drafted: tuple[float, ...]

    @classmethod
    def measured(cls, steps: Iterable[tuple[int, int]], num_draft_tokens: int) -> Profile:
        """The profile of steps of one row, (drafts, drafts accepted) each, those without a draft included."""
        counts = list(zip(*steps, strict=True))
        drafts, accepted = ([sum(n >= i for n in column) for i in range(num_draft_tokens + 1)] for column in counts)
        return cls(_survival(accepted), _survival(drafts))

    @property
    def expected_emitted(self) -> float:
        """Tokens a row emits in a step, in the mean: 1 + p1 + p1 p2 + ..."""
        return 1 + sum(itertools.accumulate(self.right, lambda a, b: a * b))

    @property
    def expected_drafts(self) -> float:
        """Drafts of a row in a step, in the mean, as `replay.ReplayDrafter` makes them: what is right is there."""
        there = map(max, self.right, self.drafted)
        return sum(itertools.accumulate(there, lambda a, b: a * b))


def _survival(at_least: Sequence[int]) -> tuple[float, ...]:
    """How often one more was reached, from how often at least 0, 1, ..., K were."""
    return tuple(after / before if before else 0.0 for before, after in itertools.pairwise(at_least))


def lookup_steps(
    prompt: Sequence[int], continuation: Sequence[int], num_draft_tokens: int, max_ngram: int
) -> list[tuple[int, int]]:
    """Drafts and accepted drafts of each step in which prompt lookup decodes `continuation`.

    The last steps, whose drafts would run past its end, are left out.
    """
    drafter = PromptLookup([*prompt, *continuation[:1]], max_ngram=max_ngram)
    place, steps = 1, []
    while place + num_draft_tokens < len(continuation):
        drafts = drafter.draft(num_draft_tokens)
        agrees = [a == b for a, b in zip(drafts, continuation[place:], strict=False)]
        accepted = [*agrees, False].index(False)
        steps.append((len(drafts), accepted))
        drafter.extend(continuation[place : place + accepted + 1])
        place += accepted + 1
    return steps


def constant_acceptance(emitted: float, num_draft_tokens: int) -> tuple[float, ...]:
    """K equal probabilities of a draft being right with which a step emits `emitted` tokens, by bisection.

    Raises:
        ValueError: `emitted` is not between 1 and K + 1.
    """
    if not 1 <= emitted <= num_draft_tokens + 1:
        raise ValueError(f"{emitted} tokens a step cannot come of {num_draft_tokens} drafts")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        found = Profile((middle,) * num_draft_tokens, ()).expected_emitted
        low, high = (middle, high) if found < emitted else (low, middle)
    return (high,) * num_draft_tokens


def paper_acceptance(num_draft_tokens: int) -> tuple[float, ...]:
    """What the paper's batch 1 implies: each step emits at least as many tokens as it is faster than greedy decoding.

    A step that verifies costs no less than one that does not, so the paper's true acceptance was this or better.
    """
    return constant_acceptance(paper_speedup("unpadded", 1) or 1.0, num_draft_tokens)
