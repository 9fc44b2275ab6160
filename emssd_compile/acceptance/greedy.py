"""Greedy matching: the rule at temperature 0."""

from __future__ import annotations

import torch

from emssd_compile.step.acceptance import Rule, Verdict, Verification


class GreedyMatch(Rule):
    """Accept the longest run of drafts that agrees with the target's argmax; then emit the target's own choice.

    Lossless: the emitted tokens are the target's greedy tokens, whatever was drafted.
    """

    lossless = True

    def forward(self, verification: Verification) -> Verdict:
        """Accept drafts up to the first that is no argmax; lengths `[B]` and the argmax behind them `[B]`."""
        # accept_length = number of leading i with draft_i == argmax p(. | drafts < i)
        drafts, lengths = verification.draft_tokens, verification.draft_lengths
        node = torch.arange(drafts.shape[1] + 1, device=drafts.device)
        choice = verification.logits.argmax(-1)  # [R]
        index = (verification.offsets[:-1, None] + node).clamp(max=choice.shape[0] - 1)  # [B, K + 1], into R
        predicted = choice[index]  # [B, K + 1]
        agrees = (drafts == predicted[:, :-1]) & (node[:-1] < lengths[:, None])  # [B, K]
        accept_lengths = agrees.to(lengths.dtype).cumprod(1).sum(1)  # [B]
        return Verdict(accept_lengths, predicted.gather(1, accept_lengths[:, None]).squeeze(1))
