"""No n-gram twice."""

from __future__ import annotations

import torch

from emssd_compile.logits.tokens import among
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

LONGEST = 16


class NoRepeatNGram(LogitsProcessor):
    """Bars the tokens that would complete an n-gram that the text holds already, as in transformers."""

    def options(self) -> dict[str, RowOption]:
        """`no_repeat_ngram_size`, of each request: n; 0 for none."""
        return {"no_repeat_ngram_size": RowOption(0, least=0, most=LONGEST)}

    def forward(self, context: LogitContext) -> Processed:
        """-inf for each token of the text before which stands what the text ends in, n - 1 tokens of both."""
        texts, size = context.texts(), context.option("no_repeat_ngram_size")[:, None]  # [R, n], [R, 1]
        newest = context.newest(LONGEST - 1)  # [R, 15]
        nothing = torch.full_like(newest, -2)  # equal to no token, and to no place without one
        before = torch.cat([nothing, texts], 1)  # [R, 15 + n]
        is_barred = (texts >= 0) & (size > 0)
        for back in range(1, LONGEST):
            start = LONGEST - 1 - back
            is_same = before[:, start : start + texts.shape[1]] == newest[:, start, None]
            is_barred = is_barred & (is_same | (back >= size))
        barred = among(torch.where(is_barred, texts, -1), context.logits.shape[1])  # [R, V]
        return Processed(context.logits.masked_fill(barred, -torch.inf))
