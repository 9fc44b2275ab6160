"""Logits that are log probabilities."""

from __future__ import annotations

import torch

from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption


class Renormalize(LogitsProcessor):
    """Shifts the logits of a row so that their exponentials sum to 1; what is drawn from is the same."""

    is_filter = True

    def options(self) -> dict[str, RowOption]:
        """`renormalize_logits`, of each request that samples."""
        return {"renormalize_logits": RowOption(False, torch.bool, needs="do_sample")}

    def forward(self, context: LogitContext) -> Processed:
        """The log probabilities of rows that ask for them."""
        asks = context.options["renormalize_logits"][context.row_ids, None]  # [R, 1]
        normalised = context.logits.float().log_softmax(1).to(context.logits.dtype)
        return Processed(torch.where(asks, normalised, context.logits))
