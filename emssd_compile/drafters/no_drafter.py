"""No drafts: plain decoding."""

from __future__ import annotations

from emssd_compile.step.drafting import Draft, DraftContext, Drafter


class NoDrafter(Drafter):
    """Drafts nothing; every step emits one token a row."""

    num_draft_tokens = 0

    def forward(self, context: DraftContext) -> Draft:
        """Tokens `[B, 0]` and lengths `[B]` of 0."""
        return Draft(context.known.new_zeros((context.known.shape[0], 0)), context.known.new_zeros(context.known.shape))
