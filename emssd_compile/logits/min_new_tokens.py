"""No end before its time."""

from __future__ import annotations

import torch

from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption


class MinNewTokens(LogitsProcessor):
    """Bars every EOS until a row has so many new tokens."""

    looks_at_ends = True

    def options(self) -> dict[str, RowOption]:
        """`min_new_tokens`, of each request."""
        return {"min_new_tokens": RowOption(default=0, least=0)}

    def forward(self, context: LogitContext) -> Processed:
        """EOS at -inf where a logit predicts a token that comes too early."""
        new = context.positions - context.prompt_lengths[context.row_ids]  # [R], new tokens before the predicted one
        barred = new < context.options["min_new_tokens"][context.row_ids]
        return Processed(context.logits.masked_fill(barred[:, None] & context.is_eos, -torch.inf))
