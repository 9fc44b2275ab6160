"""Token-level speculative sampling."""

from __future__ import annotations

import torch

from emssd_compile.acceptance.sampling import Decision, Odds, SamplingRule, ratio
from emssd_compile.step.proposals import CHAIN, DETERMINISTIC, SAMPLED


class TokenLevel(SamplingRule):
    """Test the drafts of a chain one by one, and replace the first that fails (2302.01318, 2211.17192).

    A draft x passes with probability min(1, p(x) / q(x)). The token in the place of one that fails is drawn from what q
    gave too little of, norm((p - q)+), the one behind a chain that passes as a whole from p.

    A draft that was not drawn counts as drawn from a q that is 1 at it: it passes with probability p(x), and if it
    fails, the token in its place is drawn from p without x.
    """

    accepts = (SAMPLED, DETERMINISTIC)
    shapes = (CHAIN,)

    def decide(self, odds: Odds) -> Decision:
        """All tests at once; those behind one that fails do not count."""
        draft = odds.draft
        chances = ratio(odds.p_of_drafts, odds.q_of_drafts).clamp(max=1)  # [B, K]
        passed = (odds.numbers < chances) & draft.exist
        node = passed.to(torch.int64).cumprod(1).sum(1)  # [B], of a chain the number that passed
        p = odds.p(node)  # [B, V]
        if odds.drawn == DETERMINISTIC:
            failed = draft.tokens.gather(1, node.clamp(max=draft.tokens.shape[1] - 1)[:, None])  # [B, 1]
            left = torch.where(torch.arange(p.shape[1], device=p.device) == failed, 0, p)
        else:
            left = (p - odds.q(node)).clamp(min=0)
        return Decision(node, torch.where((node < draft.lengths)[:, None], left, p), chances)
