"""The contract of an acceptance rule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


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
    """

    logits: Tensor
    offsets: Tensor
    draft_tokens: Tensor
    draft_lengths: Tensor
    seeds: Tensor
    positions: Tensor


@dataclass
class Verdict:
    """What a rule decides.

    Attributes:
        accept_lengths: int64 `[B]`, number of leading drafts accepted.
        next_tokens: int64 `[B]`, the token after them (correction or bonus), always from the target.
    """

    accept_lengths: Tensor
    next_tokens: Tensor


class Rule(nn.Module):
    """An acceptance rule: tensor operations only, no host read, no shape that depends on data (it is traced).

    Attributes:
        lossless: whether emitted tokens follow the target's distribution exactly.
    """

    lossless: bool

    def forward(self, verification: Verification) -> Verdict:
        """Decide all rows at once."""
        raise NotImplementedError
