"""Verify whatever is drafted."""

from __future__ import annotations

from emssd_compile.step.policy import LengthPolicy, PolicyContext, Ranking


class AllDrafts(LengthPolicy):
    """Every draft is worth verifying; where room is short, all rows are cut to the same length."""

    def forward(self, context: PolicyContext) -> Ranking:
        """Ranks `[B, K]`: the first drafts of all rows, then their second ones, and so on; all `[]` are wanted."""
        by_place = context.proposed.T  # [K, B]
        ranks = by_place.flatten().cumsum(0).view(by_place.shape) - 1  # by place among the row's drafts, then by row
        return Ranking(ranks.T, context.proposed.sum())
