"""Matching the target's own draw: the rule of sampling that gives the tokens of decoding without drafts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

import torch

from emssd_compile.step.acceptance import Rule, Verdict, Verification, first_accepted, targets
from emssd_compile.step.options import DO_SAMPLE, RowOption
from emssd_compile.step.randomness import gumbels


class TargetMatch(Rule):
    """Accept the drafts that are what the target itself would draw; then emit its next draw.

    A row that samples takes `argmax(log p + g)` behind each node, where the Gumbel noise g belongs to the request's
    seed, the position and the token id: a draw from p. So the tokens are those of sampling without drafts with the same
    seed, whatever is drafted and whatever the request is batched with. A row that does not sample takes the argmax of
    p: that is the same with g = 0. Needs nothing of the drafter; one that draws with the same noise
    (`randomness.gumbels`) is mostly right (2408.07978 for chains, 2506.05632 for several drafts of one token).
    """

    guarantees = "tokens"

    def __init__(self) -> None:
        super().__init__()
        self._draws = True

    def options(self) -> dict[str, RowOption]:
        """`do_sample`, of each request."""
        return {"do_sample": DO_SAMPLE} if self._draws else {}

    def suited(self, used: Collection[str]) -> Self:
        """Without noise, where nobody samples."""
        other = type(self)()
        other._draws = "do_sample" in used
        return other

    def forward(self, verification: Verification) -> Verdict:
        """From the root down, as far as drafts are what is drawn; lengths `[B]` and the draw behind them `[B]`."""
        logits = verification.logits
        if self._draws:
            ids = torch.arange(logits.shape[1], device=logits.device)
            noise = gumbels(verification.seeds[:, None], verification.positions[:, None], ids)  # [R, V]
            samples = verification.options["do_sample"][verification.row_ids]  # [R]
            logits = logits.float() + torch.where(samples[:, None], noise, 0)  # argmax(log p + g) = argmax(logits + g)
        return first_accepted(verification.draft, targets(verification, logits.argmax(-1)))
