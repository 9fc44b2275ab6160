"""No drafts: plain decoding."""

from __future__ import annotations

import torch

from emssd_compile.step.drafting import Draft, DraftContext, Drafter
from emssd_compile.step.proposals import DETERMINISTIC


class NoDrafter(Drafter):
    """Drafts nothing; every step emits one token a row.

    Args:
        instead_of: a drafter whose steps it is to fit.
    """

    num_draft_tokens = 0

    def __init__(self, instead_of: Drafter | None = None) -> None:
        super().__init__()
        if instead_of is not None:
            self.num_draft_tokens, self.max_depth = instead_of.num_draft_tokens, instead_of.max_depth
            self.num_grades, self.taps = instead_of.num_grades, instead_of.taps
            self.proposes = instead_of.proposes

    def forward(self, context: DraftContext) -> Draft:
        """Tokens `[B, K]` without a meaning, and lengths `[B]` of 0."""
        none = context.known.new_zeros((context.known.shape[0], self.num_draft_tokens))
        parents = None if self.max_depth is None else torch.zeros_like(none)
        proposal = None
        if context.drawn != DETERMINISTIC:
            shape = len(none), self.num_draft_tokens + 1, context.vocabulary
            proposal = torch.zeros(shape, dtype=torch.float32, device=none.device)
        return Draft(none, torch.zeros_like(context.known), parents=parents, proposal=proposal)
