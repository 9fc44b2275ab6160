"""Verify whatever is drafted."""

from __future__ import annotations

import torch

from emssd_compile.step.policy import LengthPolicy, PolicyContext, Ranking


class AllDrafts(LengthPolicy):
    """Every draft is worth verifying; where room is short, all rows are cut to the same length."""

    def forward(self, context: PolicyContext) -> Ranking:
        """Ranks `[B, K]`: the first drafts of all rows, then their second ones, and so on; all `[]` are wanted."""
        limit = context.grades.shape[1]
        is_proposed = torch.arange(limit, device=context.proposed.device)[:, None] < context.proposed  # [K, B]
        ranks = is_proposed.view(-1).cumsum(0).view(is_proposed.shape) - 1  # by position, then by row
        return Ranking(ranks.T, context.proposed.sum())
