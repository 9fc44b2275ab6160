"""The contract of an acceptance rule."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from emssd_compile.errors import RuleError
from emssd_compile.step.fields import STATIC, holds_tensors
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.parts import Part
from emssd_compile.step.proposals import CHAIN, DETERMINISTIC, DRAWINGS, TREE


@holds_tensors
@dataclass
class Verification:
    """What a rule decides from.

    Attributes:
        logits: float `[R, V]`, the target's logits on packed rows, after every logit option was applied.
        offsets: int64 `[B + 1]`, jagged offsets of the rows in R. Entry `offsets[b] + n` predicts what follows node n
            of row b (n = 0: its root token). Rows that verify nothing are empty.
        draft: the drafts that the step verifies; of some rows fewer than were chosen, or none.
        row_ids: int64 `[R]`, the row that each entry belongs to.
        seeds: int64 `[R]`, seed of its request.
        positions: int64 `[R]`, position in its row of the token that each entry predicts. A rule that draws takes its
            numbers from `randomness.uniforms(seeds, positions, ...)`: then a request gives the same tokens whatever it
            is batched with.
        options: the options that the rule declares, `[B]` each, by name.
        state: the rule's own tensors, as declared by `Rule.tensors`.
        drawn: how the drafts of rows that sample were drawn, one of `Rule.accepts`.
    """

    logits: Tensor
    offsets: Tensor
    draft: Nodes
    row_ids: Tensor
    seeds: Tensor
    positions: Tensor
    options: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    drawn: str = field(default=DETERMINISTIC, metadata=STATIC)


@holds_tensors
@dataclass
class Verdict:
    """What a rule decides.

    Attributes:
        accept_lengths: int64 `[B]`, number of drafts accepted; of a path, so many as follow one another.
        next_tokens: int64 `[B]`, the token after them (correction or bonus), always from the target; ids outside the
            vocabulary count as its nearest one.
        state: new values of the tensors in `Rule.tensors`, but for those written in place.
        path: int64 `[B, D + 1]`, where drafts are trees: the accepted node at each depth, the root 0 first; rubbish
            from `accept_lengths + 1` on. None where drafts are chains: node i is that of depth i.
    """

    accept_lengths: Tensor = field(metadata={"shape": "B"})
    next_tokens: Tensor = field(metadata={"shape": "B"})
    state: dict[str, Tensor] = field(default_factory=dict)
    path: Tensor | None = field(default=None, metadata={"shape": "BP", "of": "tree"})


def targets(verification: Verification, choice: Tensor) -> Tensor:
    """int64 `[B, K + 1]`: of a token chosen behind each of R packed nodes, that behind each node of each row.

    Rubbish behind nodes that are not verified.
    """
    node = torch.arange(verification.draft.tokens.shape[1] + 1, device=choice.device)
    index = (verification.offsets[:-1, None] + node).clamp(max=choice.shape[0] - 1)  # [B, N], into R
    return choice[index]


def first_accepted(draft: Nodes, wanted: Tensor) -> Verdict:
    """From the root down, accept the first draft whose token is the one that is wanted behind its parent.

    Args:
        draft: chains or trees.
        wanted: int64 `[B, K + 1]`, the token that the target chooses behind each node.
    """
    wanted_there = wanted[:, :-1] if draft.parents is None else wanted.gather(1, draft.parents)  # [B, K]
    agrees = (draft.tokens == wanted_there) & draft.exist  # [B, K]
    if draft.parents is None:
        accept_lengths = agrees.to(wanted.dtype).cumprod(1).sum(1)  # [B]
        return Verdict(accept_lengths, wanted.gather(1, accept_lengths[:, None]).squeeze(1))
    node = torch.zeros_like(wanted[:, 0])  # [B]
    path, accept_lengths = [node], node
    for _ in range(draft.max_depth):
        is_next = agrees & (draft.parents == node[:, None])  # [B, K], of none once there was none
        going = is_next.any(1)  # [B]
        node = torch.where(going, is_next.to(wanted.dtype).argmax(1) + 1, node)
        accept_lengths = accept_lengths + going
        path.append(node)
    return Verdict(accept_lengths, wanted.gather(1, node[:, None]).squeeze(1), path=torch.stack(path, 1))


def feasible(draft: Nodes, verdict: Verdict) -> Tensor:
    """How many drafts of each row a verdict may accept, int64 `[B]`: of a path, those that follow one another."""
    if verdict.path is None:
        return torch.minimum(verdict.accept_lengths, draft.lengths).clamp(min=0)
    assert draft.parents is not None
    node = verdict.path[:, 1:]  # [B, D]
    before = torch.cat([torch.zeros_like(node[:, :1]), node[:, :-1]], 1)
    parents = draft.parents.gather(1, (node - 1).clamp(0, draft.tokens.shape[1] - 1))
    fits = (node > 0) & (node <= draft.lengths[:, None]) & (parents == before)
    return torch.minimum(verdict.accept_lengths, fits.to(node.dtype).cumprod(1).sum(1)).clamp(min=0)


GUARANTEES = {
    "tokens": "the tokens are those of decoding without drafts with the same seed",
    "distribution": "the tokens follow the target's distribution, but are not those that the seed gives without drafts",
    "lossy": "the tokens need not be the model's own",
}
"""What a rule may promise of the tokens that come out, whatever is drafted."""


class Rule(Part):
    """An acceptance rule: which drafts are kept, and which token follows them.

    Attributes:
        guarantees: what it promises, of `GUARANTEES`.
        accepts: how drafts may be drawn (`proposals.DRAWINGS`), the best first: the drafter draws in the first of these
            ways that it knows.
        shapes: of which shapes drafts may be, "chain" and "tree".
        reads_proposal: whether it needs to know what drafts were drawn from: `Nodes.proposal` is there then, if they
            are drawn at all.
    """

    guarantees: str
    accepts: tuple[str, ...] = tuple(DRAWINGS)
    shapes: tuple[str, ...] = (CHAIN, TREE)
    reads_proposal: bool = False

    @property
    def lossless(self) -> bool:
        """Whether emitted tokens follow the target's distribution exactly."""
        return self.guarantees != "lossy"

    def forward(self, verification: Verification) -> Verdict:
        """Decide all rows at once."""
        raise NotImplementedError


def check_rule(rule: Rule) -> Rule:
    """The rule, if its attributes make sense. Raises RuleError saying which does not."""
    name, guarantees = type(rule).__name__, getattr(rule, "guarantees", None)
    if guarantees not in GUARANTEES:
        raise RuleError(f"{name}.guarantees = {guarantees!r}; set it to one of {list(GUARANTEES)}")
    for attribute, known in (("accepts", list(DRAWINGS)), ("shapes", [CHAIN, TREE])):
        value = getattr(rule, attribute)
        if not isinstance(value, tuple) or not value or not all(item in known for item in value):
            raise RuleError(f"{name}.{attribute} = {value!r}; set it to a tuple of some of {known}")
    if type(rule.reads_proposal) is not bool:
        raise RuleError(f"{name}.reads_proposal = {rule.reads_proposal!r}; set it to True or False")
    return rule
