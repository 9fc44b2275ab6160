"""No drafts: plain decoding."""

from __future__ import annotations

import torch

from emssd_compile.step.drafting import Draft, DraftContext, Drafter


class NoDrafter(Drafter):
    """Drafts nothing; every step emits one token a row.

    Args:
        taps: layers whose outputs the step has for another drafter.
    """

    num_draft_tokens = 0

    def __init__(self, taps: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.taps = taps

    def forward(self, context: DraftContext) -> Draft:
        """Tokens `[B, 0]`, and lengths `[B]` of 0."""
        return Draft(context.known.new_zeros((context.known.shape[0], 0)), torch.zeros_like(context.known))
