"""Sampling without the tokens that are next to impossible, where the model is unsure with less strictness."""

from __future__ import annotations

import torch

from emssd_compile.logits.distribution import barred_below, entropy
from emssd_compile.logits.epsilon_cutoff import BELOW_ONE
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption


class EtaCutoff(LogitsProcessor):
    """Bars tokens less likely than epsilon and than `sqrt(epsilon) * exp(-entropy)` (arXiv 2210.15191)."""

    is_filter = True

    def options(self) -> dict[str, RowOption]:
        """`eta_cutoff`, the epsilon of each request that samples; 0 is off."""
        return {"eta_cutoff": RowOption(0.0, torch.float32, least=0, most=BELOW_ONE, needs="do_sample")}

    def forward(self, context: LogitContext) -> Processed:
        """The logits without the tokens below each row's probability."""
        log_probabilities = context.logits.float().log_softmax(1)  # [R, V]
        epsilon = context.options["eta_cutoff"][context.row_ids, None]  # [R, 1]
        least = torch.minimum(epsilon, epsilon.sqrt() * (-entropy(log_probabilities)).exp())
        return Processed(barred_below(context.logits, log_probabilities.exp(), least))
