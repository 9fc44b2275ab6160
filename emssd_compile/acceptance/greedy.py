"""Greedy matching: the rule at temperature 0."""

from __future__ import annotations

from emssd_compile.step.acceptance import Rule, Verdict, Verification, first_accepted, targets


class GreedyMatch(Rule):
    """Accept the longest run of drafts that agrees with the target's argmax; then emit the target's own choice.

    Lossless: the emitted tokens are the target's greedy tokens, whatever was drafted. In a tree the run goes from the
    root down.
    """

    guarantees = "tokens"

    def forward(self, verification: Verification) -> Verdict:
        """Accept drafts up to the first that is no argmax; lengths `[B]` and the argmax behind them `[B]`."""
        # accept_length = number of leading i with draft_i == argmax p(. | drafts < i)
        choice = verification.logits.argmax(-1)  # [R]
        return first_accepted(verification.draft, targets(verification, choice))
