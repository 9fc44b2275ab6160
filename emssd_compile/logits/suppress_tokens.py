"""Tokens that are never chosen."""

from __future__ import annotations

import torch

from emssd_compile.logits.tokens import among
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption
from emssd_compile.step.readers import NO_TOKEN

TOKENS = 1024


class SuppressTokens(LogitsProcessor):
    """Bars tokens wherever they are."""

    def options(self) -> dict[str, RowOption]:
        """`suppress_tokens`, of each request."""
        return {"suppress_tokens": RowOption(NO_TOKEN, shape=(TOKENS,), reader="token_ids")}

    def forward(self, context: LogitContext) -> Processed:
        """-inf for the tokens."""
        barred = among(context.options["suppress_tokens"], context.logits.shape[1])[context.row_ids]  # [R, V]
        return Processed(context.logits.masked_fill(barred, -torch.inf))
