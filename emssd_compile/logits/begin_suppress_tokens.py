"""Tokens that no row begins with."""

from __future__ import annotations

import torch

from emssd_compile.logits.forced_bos_token import FORCED_BOS
from emssd_compile.logits.tokens import among
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption
from emssd_compile.step.readers import NO_TOKEN

TOKENS = 1024


class BeginSuppressTokens(LogitsProcessor):
    """Bars tokens where the first new one is chosen; behind a forced BOS, where the next one is, as in transformers."""

    def options(self) -> dict[str, RowOption]:
        """`begin_suppress_tokens`, of each request, and whether its first token is forced."""
        return {"begin_suppress_tokens": RowOption(NO_TOKEN, shape=(TOKENS,), reader="token_ids"), **FORCED_BOS}

    def forward(self, context: LogitContext) -> Processed:
        """-inf for the tokens, at one place of each row."""
        tokens = among(context.options["begin_suppress_tokens"], context.logits.shape[1])  # [B, V]
        is_forced = (context.prompt_lengths == 1) & (context.options["forced_bos_token_id"] >= 0)  # [B]
        begin = context.prompt_lengths + is_forced
        is_begin = context.positions == begin[context.row_ids]  # [R]
        return Processed(context.logits.masked_fill(is_begin[:, None] & tokens[context.row_ids], -torch.inf))
