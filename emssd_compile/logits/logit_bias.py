"""A bias on single tokens."""

from __future__ import annotations

import torch

from emssd_compile.logits.tokens import spread
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

TOKENS = 1024


class LogitBias(LogitsProcessor):
    """Adds to the logit of each token the bias that a request gives it, wherever it is, as in OpenAI's interface."""

    def options(self) -> dict[str, RowOption]:
        """`logit_bias`, of each request."""
        return {"logit_bias": RowOption(-1, torch.float32, shape=(TOKENS, 2), reader="biased_tokens")}

    def forward(self, context: LogitContext) -> Processed:
        """The logits with the biases of their rows."""
        table = context.options["logit_bias"]  # [B, M, 2]
        bias = spread(table[:, :, 0].to(torch.int64), table[:, :, 1], context.logits.shape[1])  # [B, V]
        bias = bias[context.row_ids].to(context.logits.dtype)  # [R, V]
        return Processed(torch.where(bias == 0, context.logits, context.logits + bias))
