"""The contract of an acceptance rule."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from emssd_compile.errors import RuleError
from emssd_compile.step.parts import Part


@dataclass
class Verification:
    """What a rule decides from.

    Attributes:
        logits: float `[R, V]`, the target's logits on packed rows, after every logit option was applied.
        offsets: int64 `[B + 1]`, jagged offsets of the rows in R. Entry `offsets[b] + i` predicts what follows the i-th
            draft of row b (i = 0: what follows its newest known token). Rows that verify nothing are empty.
        draft_tokens: int64 `[B, K]`, rubbish from `draft_lengths` on.
        draft_lengths: int64 `[B]`.
        seeds: int64 `[R]`, seed of the request that each entry belongs to.
        positions: int64 `[R]`, position in its row of the token that each entry predicts. A rule that draws takes its
            numbers from `randomness.uniforms(seeds, positions, ...)`: then a request gives the same tokens whatever it
            is batched with.
        state: the rule's own tensors, as declared by `Rule.tensors`.
    """

    logits: Tensor
    offsets: Tensor
    draft_tokens: Tensor
    draft_lengths: Tensor
    seeds: Tensor
    positions: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Verdict:
    """What a rule decides.

    Attributes:
        accept_lengths: int64 `[B]`, number of leading drafts accepted; what exceeds `draft_lengths` is cut.
        next_tokens: int64 `[B]`, the token after them (correction or bonus), always from the target; ids outside the
            vocabulary count as its nearest one.
        state: new values of the tensors in `Rule.tensors`, but for those written in place.
    """

    accept_lengths: Tensor = field(metadata={"shape": "B"})
    next_tokens: Tensor = field(metadata={"shape": "B"})
    state: dict[str, Tensor] = field(default_factory=dict)


class Rule(Part):
    """An acceptance rule: which drafts are kept, and which token follows them.

    Attributes:
        lossless: whether emitted tokens follow the target's distribution exactly.
    """

    lossless: bool

    def forward(self, verification: Verification) -> Verdict:
        """Decide all rows at once."""
        raise NotImplementedError


def check_rule(rule: Rule) -> Rule:
    """The rule, if it says whether it is lossless. Raises RuleError if not."""
    lossless = getattr(rule, "lossless", None)
    if type(lossless) is not bool:
        raise RuleError(f"{type(rule).__name__}.lossless = {lossless!r}; set it to True or False")
    return rule
