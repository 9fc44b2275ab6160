"""The last token that a row may emit."""

from __future__ import annotations

import torch

from emssd_compile.logits.tokens import among
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption
from emssd_compile.step.readers import NO_TOKEN

TOKENS = 16


class ForcedEOSToken(LogitsProcessor):
    """Leaves one choice, or a few, for the token with which a row reaches its limit, as in transformers."""

    def options(self) -> dict[str, RowOption]:
        """`forced_eos_token_id`, of each request: one, or several."""
        return {"forced_eos_token_id": RowOption(NO_TOKEN, shape=(TOKENS,), reader="token_ids")}

    def forward(self, context: LogitContext) -> Processed:
        """0 for the tokens and -inf for all others, at the limit."""
        is_any = among(context.option("forced_eos_token_id"), context.logits.shape[1])  # [R, V]
        only = torch.zeros_like(context.logits).masked_fill(~is_any, -torch.inf)
        is_last = context.positions == context.limits[context.row_ids] - 1  # [R]
        return Processed(torch.where(is_last[:, None] & is_any.any(1, keepdim=True), only, context.logits))
