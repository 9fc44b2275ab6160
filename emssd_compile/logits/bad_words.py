"""Words that are not to be said."""

from __future__ import annotations

import torch

from emssd_compile.logits.sequences import completing
from emssd_compile.logits.tokens import among
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

WORDS, LONGEST = 512, 16


class BadWords(LogitsProcessor):
    """Bars the last token of each word where the text ends in the others; as in transformers, an EOS alone is none."""

    looks_at_ends = True

    def options(self) -> dict[str, RowOption]:
        """`bad_words_ids`, of each request."""
        return {"bad_words_ids": RowOption(-1, shape=(WORDS, LONGEST), reader="token_sequences")}

    def forward(self, context: LogitContext) -> Processed:
        """-inf for tokens that would complete a word."""
        words = context.option("bad_words_ids")  # [R, W, L]
        last = completing(context, words)  # [R, W]
        is_eos_alone = context.is_eos[last.clamp(min=0)] & (words[:, :, -2] < 0)
        barred = among(torch.where(is_eos_alone, -1, last), context.logits.shape[1])  # [R, V]
        return Processed(context.logits.masked_fill(barred, -torch.inf))
