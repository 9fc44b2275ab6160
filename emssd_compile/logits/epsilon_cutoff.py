"""Sampling without the tokens that are next to impossible."""

from __future__ import annotations

import torch

from emssd_compile.logits.distribution import barred_below
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

BELOW_ONE = 1 - 2.0**-24
"""The largest float32 that is less than 1."""


class EpsilonCutoff(LogitsProcessor):
    """Bars tokens that are less likely than a fixed probability (arXiv 2210.15191)."""

    is_filter = True

    def options(self) -> dict[str, RowOption]:
        """`epsilon_cutoff`, of each request that samples; 0 is off."""
        return {"epsilon_cutoff": RowOption(0.0, torch.float32, least=0, most=BELOW_ONE, needs="do_sample")}

    def forward(self, context: LogitContext) -> Processed:
        """The logits without the tokens below each row's probability."""
        least = context.options["epsilon_cutoff"][context.row_ids, None]  # [R, 1]
        return Processed(barred_below(context.logits, context.logits.float().softmax(1), least))
