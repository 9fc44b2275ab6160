"""What rules of sampling have in common: the odds that they decide by, and how a decision becomes a verdict."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.acceptance.greedy import GreedyMatch
from emssd_compile.step.acceptance import Rule, Verdict, Verification, first_accepted, targets
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.options import DO_SAMPLE, RowOption
from emssd_compile.step.proposals import DETERMINISTIC
from emssd_compile.step.randomness import ACCEPTANCE, RESIDUALS, gumbels, uniforms


@dataclass
class Odds:
    """What drafts are weighed by. All of it may be of float64.

    Attributes:
        draft: the drafts, with what they were drawn from.
        weights: float `[R, V]`, p: the target's distribution behind each of R packed nodes.
        offsets: int64 `[B + 1]`, jagged offsets of the rows in R.
        numbers: float `[B, K]`, uniform on (0, 1), independent: one for the test of each draft.
        drawn: how the drafts were drawn.
    """

    draft: Nodes
    weights: Tensor
    offsets: Tensor
    numbers: Tensor
    drawn: str

    @classmethod
    def of(cls, verification: Verification) -> Odds:
        """Those of a verification."""
        draft, weights = verification.draft, verification.logits.float().softmax(1)
        seeds, positions = (each[:, None] for each in _of_roots(verification))
        numbers = uniforms(seeds, positions, ACCEPTANCE, draft.index)
        return cls(draft, weights, verification.offsets, numbers, verification.drawn)

    @property
    def parents(self) -> Tensor:
        """int64 `[B, K]`, the node that each draft follows; of chains, too."""
        draft = self.draft
        return draft.index.expand_as(draft.tokens) if draft.parents is None else draft.parents

    @property
    def rows(self) -> Tensor:
        """int64 `[B]`, the number of each row."""
        return torch.arange(len(self.draft.lengths), device=self.offsets.device)

    def p(self, node: Tensor) -> Tensor:
        """`[B, V]`: p behind a node of each row, `[B]`."""
        return self.weights[(self.offsets[:-1] + node).clamp(max=self.weights.shape[0] - 1)]

    def q(self, node: Tensor) -> Tensor:
        """`[B, V]`: what the drafts behind a node of each row, `[B]`, were drawn from."""
        assert self.draft.proposal is not None
        return self.draft.proposal[self.rows, node]

    @property
    def p_of_drafts(self) -> Tensor:
        """`[B, K]`: p of each draft, behind its parent."""
        index = (self.offsets[:-1, None] + self.parents).clamp(max=self.weights.shape[0] - 1)
        return self.weights[index, self.draft.tokens]

    @property
    def q_of_drafts(self) -> Tensor:
        """`[B, K]`: q of each draft, behind its parent; 1 if it is the only one that could have been made."""
        if self.drawn == DETERMINISTIC:
            return torch.ones_like(self.numbers)
        assert self.draft.proposal is not None
        return self.draft.proposal[self.rows[:, None], self.parents, self.draft.tokens]


@dataclass
class Decision:
    """What a rule decides of rows that sample.

    Attributes:
        node: int64 `[B]`, the last node accepted; those on the way to it are accepted, too.
        weights: float `[B, V]`, what the next token is drawn from, not normalised. Where nothing is left but rounding
            errors, p behind the node is taken.
        chances: float `[B, K]`, the number that each draft's had to be below for the draft to pass its test, given how
            the tests before it ended; rubbish for those that were not tested.
    """

    node: Tensor
    weights: Tensor
    chances: Tensor


class SamplingRule(Rule):
    """A rule that decides by odds where rows sample, and by the argmax of p where they do not."""

    guarantees = "distribution"
    reads_proposal = True

    def options(self) -> dict[str, RowOption]:
        """`do_sample`, of each request."""
        return {"do_sample": DO_SAMPLE}

    def suited(self, used: Collection[str]) -> Rule:  # type: ignore[override]
        """Greedy matching, where nobody samples."""
        return self if "do_sample" in used else GreedyMatch()

    def decide(self, odds: Odds) -> Decision:
        """Which drafts are kept, and what the token behind them is drawn from, for all rows as if they sampled.

        K is at least 1.
        """
        raise NotImplementedError

    def forward(self, verification: Verification) -> Verdict:
        """The drafts kept, lengths `[B]` and of trees the path `[B, D + 1]`, and the token behind them `[B]`."""
        logits, draft = verification.logits, verification.draft
        odds = Odds.of(verification)
        decision = self.decide(odds) if draft.tokens.shape[1] > 0 else _nothing_drafted(odds)
        seeds, positions = (each[:, None] for each in _of_roots(verification))
        ids = torch.arange(logits.shape[1], device=logits.device)
        is_left = decision.weights.sum(1, keepdim=True) > 0  # [B, 1]
        weights = torch.where(is_left, decision.weights, odds.p(decision.node))
        drawn = (weights.log() + gumbels(seeds, positions, ids, RESIDUALS)).argmax(1)  # [B]
        certain = first_accepted(draft, targets(verification, logits.argmax(-1)))
        samples = verification.options["do_sample"]
        next_tokens = torch.where(samples, drawn, certain.next_tokens)
        if certain.path is None:
            return Verdict(torch.where(samples, decision.node, certain.accept_lengths), next_tokens)
        path, depths = path_to(draft, decision.node)
        path = torch.where(samples[:, None], path, certain.path)
        return Verdict(torch.where(samples, depths, certain.accept_lengths), next_tokens, path=path)


def _nothing_drafted(odds: Odds) -> Decision:
    root = torch.zeros_like(odds.draft.lengths)
    return Decision(root, odds.p(root), odds.numbers)


def path_to(draft: Nodes, node: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes from the root to a node of each row's tree, `[B, D + 1]`, rubbish behind it; and its depth `[B]`."""
    assert draft.parents is not None
    above = torch.cat([torch.zeros_like(draft.parents[:, :1]), draft.parents], 1)  # [B, N], the root is its own parent
    upwards = [node]
    for _ in range(draft.max_depth):
        upwards.append(above.gather(1, upwards[-1][:, None]).squeeze(1))
    from_node = torch.stack(upwards, 1)  # [B, D + 1]
    depths = (from_node > 0).sum(1)  # [B]
    back = depths[:, None] - torch.arange(draft.max_depth + 1, device=node.device)
    return from_node.gather(1, back.clamp(min=0)), depths


def _of_roots(verification: Verification) -> tuple[Tensor, Tensor]:
    """Seed of each row, and the position behind its root, `[B]` each; rubbish of rows that verify nothing."""
    first = verification.offsets[:-1].clamp(max=verification.seeds.shape[0] - 1)
    return verification.seeds[first], verification.positions[first]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of numbers of at least 0; 0 where it would be divided by 0."""
    safe = torch.where(denominator > 0, denominator, 1)
    return torch.where(denominator > 0, numerator / safe, 0)


def normalised(weights: Tensor) -> Tensor:
    """`[B, V]` with lines that add up to 1; zeros where there are only zeros."""
    return ratio(weights, weights.sum(1, keepdim=True))
