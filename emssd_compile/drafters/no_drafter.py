"""No drafts: plain decoding, or nothing in the place of a drafter that is left out."""

from __future__ import annotations

import torch

from emssd_compile.step.drafting import Draft, DraftContext, Drafter
from emssd_compile.step.proposals import DETERMINISTIC


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


class Silent(Drafter):
    """Drafts nothing in the place of another drafter, and is of its shape; what that one keeps is left as it is.

    Args:
        drafter: the other one.
    """

    any_rows = True

    def __init__(self, drafter: Drafter) -> None:
        super().__init__()
        self.num_draft_tokens, self.max_depth = drafter.num_draft_tokens, drafter.max_depth
        self.num_grades, self.taps, self.proposes = drafter.num_grades, drafter.taps, drafter.proposes

    def forward(self, context: DraftContext) -> Draft:
        """Lengths `[B]` of 0, and tokens `[B, K]` of which none counts."""
        rows = context.known.shape[0]
        tokens = context.known.new_zeros((rows, self.num_draft_tokens))
        parents = None if self.max_depth is None else tokens
        proposal = None
        if context.drawn != DETERMINISTIC:
            shape = (rows, self.num_draft_tokens + 1, context.vocabulary)
            proposal = context.hidden.new_zeros(shape, dtype=torch.float32)
        return Draft(tokens, torch.zeros_like(context.known), parents=parents, proposal=proposal)
