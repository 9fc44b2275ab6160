"""Greedy matching: the rule at temperature 0."""

from __future__ import annotations

import torch

from emssd_compile.step.acceptance import Rule, Verdict, Verification, first_accepted


class GreedyMatch(Rule):
    """Accept the longest run of drafts that agrees with the target's argmax; then emit the target's own choice.

    Lossless: the emitted tokens are the target's greedy tokens, whatever was drafted. In a tree the run goes from the
    root down.
    """

    lossless = True

    def forward(self, verification: Verification) -> Verdict:
        """Accept drafts up to the first that is no argmax; lengths `[B]` and the argmax behind them `[B]`."""
        # accept_length = number of leading i with draft_i == argmax p(. | drafts < i)
        draft = verification.draft
        node = torch.arange(draft.tokens.shape[1] + 1, device=draft.tokens.device)
        choice = verification.logits.argmax(-1)  # [R]
        index = (verification.offsets[:-1, None] + node).clamp(max=choice.shape[0] - 1)  # [B, N], into R
        return first_accepted(draft, choice[index])
