"""Block verification."""

from __future__ import annotations

import torch

from emssd_compile.acceptance.sampling import Decision, Odds, SamplingRule, ratio
from emssd_compile.step.proposals import CHAIN, SAMPLED


class BlockVerification(SamplingRule):
    """Test the beginnings of a chain, all of them, and keep the longest that passes (2403.10444).

    A draft that p likes more than q does makes up for one before it that p likes less, so more drafts are kept than by
    testing each by itself. With x_1 ... x_g the drafts, p_i and q_i what they are and were drawn from:

        w_0 = 1,  w_i = min(1, w_(i-1) p_i(x_i) / q_i(x_i))
        S_i = sum of (w_i p_(i+1) - q_(i+1))+
        h_i = S_i / (S_i + 1 - w_i) for i < g,  h_g = w_g

    The first i drafts pass with probability h_i. With t the largest i that passes, 0 if none does, the next token is
    drawn from norm((w_t p_(t+1) - q_(t+1))+), or from p_(g+1) if t = g.
    """

    accepts = (SAMPLED,)
    shapes = (CHAIN,)

    def decide(self, odds: Odds) -> Decision:
        """All tests at once; of those that pass, the last counts."""
        draft, count = odds.draft, odds.draft.tokens.shape[1]
        root = torch.zeros_like(draft.lengths)
        share = torch.ones_like(odds.weights[root, 0])  # [B]
        shares, chances = [share], []
        likelihood = ratio(odds.p_of_drafts, odds.q_of_drafts)  # [B, K]
        for index in range(count):
            share = (share * likelihood[:, index]).clamp(max=1)  # w_i, i = index + 1
            left = (share[:, None] * odds.p(root + index + 1) - odds.q(root + index + 1)).clamp(min=0).sum(1)  # S_i
            is_last = draft.lengths == index + 1
            chances.append(torch.where(is_last, share, chance_to_stop(left, share)))
            shares.append(share)
        tests = torch.stack(chances, 1)  # [B, K]
        passed = (odds.numbers < tests) & draft.exist
        node = torch.where(passed, draft.index + 1, 0).amax(1)  # [B]
        share = torch.stack(shares, 1).gather(1, node[:, None])  # [B, 1]
        p = odds.p(node)
        left = (share * p - odds.q(node)).clamp(min=0)
        return Decision(node, torch.where((node < draft.lengths)[:, None], left, p), tests)


def chance_to_stop(left: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """S / (S + 1 - w), `[B]`: the chance to stop at a node that has the share w, where S is left; 1 for 0 / 0.

    0 / 0 means that p is q there and nothing is missing: then whatever came next would have passed.
    """
    return torch.where((left == 0) & (share >= 1), 1, ratio(left, left + 1 - share))
