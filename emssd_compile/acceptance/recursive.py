"""Recursive rejection sampling of trees."""

from __future__ import annotations

import torch

from emssd_compile.acceptance.sampling import Decision, Odds, SamplingRule, normalised, ratio
from emssd_compile.step.proposals import SAMPLED, WITHOUT_REPLACEMENT


class RecursiveRejection(SamplingRule):
    """Test the drafts behind a node in the order drawn; go on behind the first that passes (2305.09781, 2401.06706).

    At a node P = p and Q = q. A draft x passes with probability P(x) / Q(x). If it fails, P = norm((P - Q)+), and where
    drafts are drawn without replacement also Q(x) = 0 and Q = norm(Q). If none is left, the next token is drawn from P.
    On a chain this is the token-level rule.

    Args:
        with_replacement: take siblings that were drawn independently only, of which some may be the same token.
            Otherwise they are drawn without replacement where the drafter can, which keeps more.
    """

    accepts: tuple[str, ...] = (WITHOUT_REPLACEMENT, SAMPLED)

    def __init__(self, *, with_replacement: bool = False) -> None:
        super().__init__()
        if with_replacement:
            self.accepts = (SAMPLED,)

    def decide(self, odds: Odds) -> Decision:
        """One draft after another, as they are numbered; only those that follow the last accepted one count."""
        draft, parents = odds.draft, odds.parents
        node = torch.zeros_like(draft.lengths)  # [B], the last one accepted
        p = odds.p(node)  # [B, V], P
        q = odds.q(node)  # [B, V], Q
        ids = torch.arange(p.shape[1], device=p.device)
        chances = []
        for index in range(draft.tokens.shape[1]):
            token = draft.tokens[:, index, None]  # [B, 1]
            of_token = q.gather(1, token).squeeze(1)  # [B]; 0: when all that q has was drawn, what follows was not
            chance = ratio(p.gather(1, token).squeeze(1), of_token).clamp(max=1)
            tested = draft.exist[:, index] & (parents[:, index] == node) & (of_token > 0)
            passed = tested & (odds.numbers[:, index] < chance)
            failed = (tested & ~passed)[:, None]
            p = torch.where(failed, normalised((p - q).clamp(min=0)), p)
            if odds.drawn == WITHOUT_REPLACEMENT:
                q = torch.where(failed, normalised(torch.where(ids == token, 0, q)), q)
            node = torch.where(passed, index + 1, node)
            p = torch.where(passed[:, None], odds.p(node), p)
            q = torch.where(passed[:, None], odds.q(node), q)
            chances.append(chance)
        return Decision(node, p, torch.stack(chances, 1))
