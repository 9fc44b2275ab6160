"""Traversal verification of trees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.acceptance.block import chance_to_stop
from emssd_compile.acceptance.sampling import Decision, Odds, SamplingRule, ratio
from emssd_compile.step.proposals import SAMPLED, WITHOUT_REPLACEMENT


class TraversalVerification(SamplingRule):
    """Test the drafts of a tree from its leaves up, and keep the first that passes with all above it (2505.12398).

    A node is entered with a share a, the root with 1; there P = p and Q = q. Each draft x behind it is entered, in the
    order drawn, with the share min(1, a P(x) / Q(x)). If it fails, then with R = (a P - Q)+ the node's share becomes
    sum R / (sum R + 1 - a) and P = norm(R), and where drafts are drawn without replacement also Q(x) = 0 and
    Q = norm(Q). When none is left, the node itself passes with probability a, and the next token is drawn from its P.
    On a chain this is block verification.

    What is left of p at a node is always norm((p - c q)+) for a number c, which grows with each draft that fails, but
    for tokens whose Q is 0: there c stays as it was. So a few numbers for each node are all that is kept.
    """

    accepts = (WITHOUT_REPLACEMENT, SAMPLED)

    def decide(self, odds: Odds) -> Decision:
        """One test after another, in each row that of the first leaf that is left."""
        draft, number = odds.draft, odds.numbers
        last = torch.zeros_like(draft.lengths)  # [B], the node that passed; the root always does
        done = torch.zeros_like(draft.lengths, dtype=torch.bool)
        walk, chances = _Walk(odds), torch.zeros_like(number)
        for _ in range(draft.tokens.shape[1]):
            leaf = walk.first_leaf()
            is_leaf = walk.index == leaf.node[:, None] - 1  # [B, K]
            tested = (leaf.node > 0) & ~done
            passed = tested & (torch.where(is_leaf, number, 0).sum(1) < leaf.share)
            chances = torch.where(is_leaf & tested[:, None], leaf.share[:, None], chances)
            last, done = torch.where(passed, leaf.node, last), done | passed
            walk.drop(leaf, is_leaf & (tested & ~passed)[:, None])
        return Decision(last, walk.left_behind(last), chances)


@dataclass
class _Leaf:
    """A node that has nothing below it, `[B]` each.

    Attributes:
        node: its number; the root, if that is all that is left.
        share: with what it was entered, or what is left of that.
        above: its parent.
        share_above: that of its parent.
    """

    node: Tensor
    share: Tensor
    above: Tensor
    share_above: Tensor


class _Walk:
    """The trees of all rows while they are tested: what is left of them, and of p at each node.

    Attributes:
        index: int64 `[K]`, the number of each draft.
        shares: `[B, K + 1]`, a of nodes behind which a draft failed, and of the root.
        is_known: bool `[B, K + 1]`, whether that is so.
        cuts: `[B, K + 1]`, c.
        mass: `[B, K + 1]`, the sum of (p - c q)+.
        rest: `[B, K + 1]`, the sum of Q before it is normalised.
        likelihood: `[B, K]`, P / Q of each draft that is left, behind its parent.
        left: bool `[B, K]`, the drafts that are left.
        failed: bool `[B, K]`, those that failed, and `cut_off`, `[B, K]`, the c at which each did.
    """

    def __init__(self, odds: Odds) -> None:
        draft = odds.draft
        self.odds, self.index = odds, draft.index
        self.parents, self.depth = odds.parents, draft.max_depth
        self.p, self.q = odds.p_of_drafts, odds.q_of_drafts  # [B, K]
        self.nodes = torch.arange(len(self.index) + 1, device=self.index.device)  # [N]
        ones = torch.ones_like(odds.numbers[:, :1]).expand(-1, len(self.nodes))
        self.shares, self.mass, self.rest, self.cuts = ones, ones, ones, torch.zeros_like(ones)
        self.is_known = (self.nodes == 0).expand_as(ones)
        self.raw = self.likelihood = ratio(self.p, self.q)
        self.left = draft.exist & (self.q > 0)  # q = 0: all that q has was drawn, what follows was not
        self.failed, self.cut_off = torch.zeros_like(self.left), torch.zeros_like(self.p)

    def first_leaf(self) -> _Leaf:
        """From the root down, always to the first draft that is left."""
        root = torch.zeros_like(self.odds.draft.lengths)
        leaf = _Leaf(root, self.shares[:, 0], root, self.shares[:, 0])
        for _ in range(self.depth):
            below = self.left & (self.parents == leaf.node[:, None])  # [B, K]
            first = torch.where(below, self.index, len(self.index)).amin(1)  # [B]
            going, first = first < len(self.index), first.clamp(max=len(self.index) - 1)
            entered = (leaf.share * _at(self.likelihood, first)).clamp(max=1)
            share = torch.where(_at(self.is_known, first + 1), _at(self.shares, first + 1), entered)
            leaf = _Leaf(
                node=torch.where(going, first + 1, leaf.node),
                share=torch.where(going, share, leaf.share),
                above=torch.where(going, leaf.node, leaf.above),
                share_above=torch.where(going, leaf.share, leaf.share_above),
            )
        return leaf

    def drop(self, leaf: _Leaf, failed: Tensor) -> None:
        """Take the draft that failed out, bool `[B, K]`, at most one of each row, and weigh its parent anew."""
        share, mass, rest = leaf.share_above, _at(self.mass, leaf.above), _at(self.rest, leaf.above)
        cut = _at(self.cuts, leaf.above) + ratio(mass, share * rest)  # [B]: (a P - Q)+ is (a / mass) (p - cut q)+
        self.cuts = self._put(self.cuts, leaf, failed, cut)
        self.cut_off = torch.where(failed, cut[:, None], self.cut_off)
        self.failed, self.left = self.failed | failed, self.left & ~failed
        new_mass, new_rest = self.left_behind(leaf.above).sum(1), self._rest(leaf.above)
        new_share = chance_to_stop(ratio(share * new_mass, mass), share)
        self.shares = self._put(self.shares, leaf, failed, new_share)
        self.is_known = self._put(self.is_known, leaf, failed, failed.any(1))
        self.mass = self._put(self.mass, leaf, failed, new_mass)
        self.rest = self._put(self.rest, leaf, failed, new_rest)
        siblings = (self.parents == leaf.above[:, None]) & failed.any(1, keepdim=True)  # [B, K]
        likelihood = ratio((self.raw - cut[:, None]).clamp(min=0) * new_rest[:, None], new_mass[:, None])
        self.likelihood = torch.where(siblings, likelihood, self.likelihood)

    def left_behind(self, node: Tensor) -> Tensor:
        """What is left of p behind a node of each row, `[B, V]`, not normalised."""
        cut = _at(self.cuts, node)[:, None]  # [B, 1]
        p = self.odds.p(node)
        if self.odds.draft.proposal is None:
            return p
        left = (p - cut * self.odds.q(node)).clamp(min=0)
        if not self._takes_out:
            return left
        earlier = (self.p - self.cut_off * self.q).clamp(min=0) - (self.p - cut * self.q).clamp(min=0)  # [B, K]
        return left.scatter_add(1, self.odds.draft.tokens, torch.where(self._failed_behind(node), earlier, 0))

    def _rest(self, node: Tensor) -> Tensor:
        """The sum of q over what may still be drawn behind a node, `[B]`: by adding that up, for it may be little."""
        if not self._takes_out:
            return torch.ones_like(self.rest[:, 0])
        gone = torch.where(self._failed_behind(node), -self.q, 0)
        return self.odds.q(node).scatter_add(1, self.odds.draft.tokens, gone).sum(1)

    @property
    def _takes_out(self) -> bool:
        return self.odds.drawn == WITHOUT_REPLACEMENT

    def _failed_behind(self, node: Tensor) -> Tensor:
        return self.failed & (self.parents == node[:, None])

    def _put(self, values: Tensor, leaf: _Leaf, failed: Tensor, new: Tensor) -> Tensor:
        """`values[B, K + 1]` with those of the parent replaced, in rows in which a draft failed."""
        return torch.where((self.nodes == leaf.above[:, None]) & failed.any(1, keepdim=True), new[:, None], values)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """`[B]`: the value of one index of each row."""
    return values.gather(1, index[:, None]).squeeze(1)
