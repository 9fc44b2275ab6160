"""Rules for several drafts of the same token, which were drawn independently of one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.acceptance.sampling import Decision, Odds, SamplingRule
from emssd_compile.step.proposals import SAMPLED, TREE


@dataclass
class Candidates:
    """The drafts behind one node of each row: k independent draws from q. Some may be the same token.

    Attributes:
        tokens: int64 `[B, K]`, of all drafts of the row.
        exist: bool `[B, K]`, which of these follow the node.
        p: float `[B, V]`, the target's distribution behind the node.
        q: float `[B, V]`, what the candidates were drawn from.
    """

    tokens: Tensor
    exist: Tensor
    p: Tensor
    q: Tensor

    @property
    def count(self) -> Tensor:
        """int64 `[B, 1]`, k; 0 behind a leaf."""
        return self.exist.sum(1, keepdim=True)


class MultiDraftRule(SamplingRule):
    """From the root down, keep one of the candidates behind a node, or end there.

    Of the candidates that pass their tests the first one is kept. A chain has one candidate for each token, for which
    all such rules are the token-level one; so trees are what they are for.
    """

    accepts = (SAMPLED,)
    shapes = (TREE,)

    def choose(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """How candidates are tested, at one node of each row.

        Returns:
            The probability with which each passes its test, `[B, K]`, and what the next token is drawn from if none
            does, `[B, V]`, not normalised. That is p behind a leaf.
        """
        raise NotImplementedError

    def decide(self, odds: Odds) -> Decision:
        """One level after another; a row that has come to its end decides there again, by the same numbers."""
        draft = odds.draft
        node = torch.zeros_like(draft.lengths)  # [B], the last one accepted
        weights, tests = odds.p(node), torch.zeros_like(odds.numbers)
        for _ in range(draft.max_depth):
            follows = draft.exist & (odds.parents == node[:, None])  # [B, K]
            chances, left = self.choose(Candidates(draft.tokens, follows, odds.p(node), odds.q(node)))
            passed = follows & (odds.numbers < chances)
            going = passed.any(1)  # [B]
            first = torch.where(passed, draft.index, len(draft.index)).amin(1)  # [B]
            node = torch.where(going, first + 1, node)
            weights = torch.where(going[:, None], odds.p(node), left)
            tests = torch.where(follows, chances, tests)
        return Decision(node, weights, tests)
