"""The token behind a text of one token."""

from __future__ import annotations

import torch

from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption
from emssd_compile.step.readers import NO_TOKEN

FORCED_BOS = {"forced_bos_token_id": RowOption(NO_TOKEN, reader="token_id")}


class ForcedBOSToken(LogitsProcessor):
    """Leaves one choice for the second token of a text, as in transformers, whose decoders begin with a start token."""

    def options(self) -> dict[str, RowOption]:
        """`forced_bos_token_id`, of each request."""
        return FORCED_BOS

    def forward(self, context: LogitContext) -> Processed:
        """0 for the token and -inf for all others, where a text has one token."""
        token, tokens = context.option("forced_bos_token_id")[:, None], context.logits.shape[1]
        is_it = torch.arange(tokens, device=token.device) == token  # [R, V]
        only = torch.zeros_like(context.logits).masked_fill(~is_it, -torch.inf)
        is_forced = (context.positions[:, None] == 1) & (token >= 0)
        return Processed(torch.where(is_forced, only, context.logits))
