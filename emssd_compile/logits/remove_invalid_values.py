"""Finite logits."""

from __future__ import annotations

import torch

from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption


class RemoveInvalidValues(LogitsProcessor):
    """Makes NaN 0, and what is infinite the largest or the lowest number there is, as in transformers."""

    def options(self) -> dict[str, RowOption]:
        """`remove_invalid_values`, of each request."""
        return {"remove_invalid_values": RowOption(False, torch.bool)}

    def forward(self, context: LogitContext) -> Processed:
        """Finite numbers in the rows that ask for it."""
        logits, limits = context.logits, torch.finfo(context.logits.dtype)
        valid = torch.where(logits.isnan(), 0, logits.clamp(limits.min, limits.max))
        return Processed(torch.where(context.option("remove_invalid_values")[:, None], valid, logits))
