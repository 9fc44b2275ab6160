"""Sampling from the tokens that are not much less likely than the likeliest."""

from __future__ import annotations

import torch

from emssd_compile.logits.distribution import barred_below
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption


class MinP(LogitsProcessor):
    """Bars tokens that are less likely than a share of the likeliest token's probability (arXiv 2407.01082)."""

    is_filter = True

    def options(self) -> dict[str, RowOption]:
        """`min_p`, of each request that samples; 0 is off."""
        return {"min_p": RowOption(0.0, torch.float32, least=0, most=1, needs="do_sample")}

    def forward(self, context: LogitContext) -> Processed:
        """The logits without the tokens below each row's share."""
        probabilities = context.logits.float().softmax(1)  # [R, V]
        share = context.options["min_p"][context.row_ids, None]  # [R, 1]
        least = share * probabilities.amax(1, keepdim=True)
        return Processed(barred_below(context.logits, probabilities, least))
