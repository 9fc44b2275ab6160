"""Typical acceptance: lossy."""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

import torch

from emssd_compile.acceptance.greedy import GreedyMatch
from emssd_compile.acceptance.sampling import Decision, Odds, SamplingRule
from emssd_compile.errors import OptionError
from emssd_compile.numeric import shown
from emssd_compile.step.acceptance import Verdict, Verification
from emssd_compile.step.nodes import of_parents
from emssd_compile.step.proposals import DRAWINGS


class TypicalAcceptance(SamplingRule):
    """Accept drafts that the target would not find strange (Medusa, 2401.10774): more of them, of another distribution.

    A draft x passes if p(x) > min(epsilon, delta exp(-H)), H the entropy of p in nats: where p is flat, an unlikely
    token is no surprise. The longest path of drafts that pass is kept, of several the first; the next token is drawn
    from p. The tokens lean towards what was drafted, so they need not follow the target's distribution.

    Args:
        epsilon: a draft of at least this probability always passes; above 0, up to 1.
        delta: how far the threshold sinks where p is flat; above 0, up to 1.
    """

    guarantees = "lossy"
    accepts = tuple(DRAWINGS)
    reads_proposal = False

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        super().__init__()
        for name, value in (("epsilon", epsilon), ("delta", delta)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise OptionError(f"TypicalAcceptance {name}={shown(value)} must be a number above 0, up to 1")
        self.epsilon, self.delta = float(epsilon), float(delta)
        self._draws = True

    def suited(self, used: Collection[str]) -> Self:
        """Greedy matching by the same name, where nobody samples: that it is lossy is still to be said."""
        other = type(self)(self.epsilon, self.delta)
        other._draws = "do_sample" in used
        return other

    def forward(self, verification: Verification) -> Verdict:
        """The drafts kept, lengths `[B]` and of trees the path `[B, D + 1]`, and the token behind them `[B]`."""
        return super().forward(verification) if self._draws else GreedyMatch()(verification)

    def decide(self, odds: Odds) -> Decision:
        """All tests at once; they have no chance in them."""
        draft, parents = odds.draft, odds.parents
        entropy = -torch.special.xlogy(odds.weights, odds.weights).sum(1)  # [R]
        above = (odds.offsets[:-1, None] + parents).clamp(max=entropy.shape[0] - 1)  # [B, K], into R
        threshold = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)[above]
        passes = (odds.p_of_drafts > threshold) & draft.exist  # [B, K]
        lengths = torch.zeros_like(parents)  # [B, K], drafts of the path to each one, if all of them pass
        for _ in range(draft.max_depth):
            before = of_parents(lengths, parents, root=0)
            lengths = torch.where(passes & ((parents == 0) | (before > 0)), before + 1, 0)
        longest = (lengths * lengths.shape[1] - draft.index).argmax(1)  # [B], of several the first
        node = torch.where((lengths > 0).any(1), longest + 1, 0)
        return Decision(node, odds.p(node), passes.to(odds.weights.dtype))
