"""A bias on the last token of sequences."""

from __future__ import annotations

import torch

from emssd_compile.logits.sequences import completing
from emssd_compile.logits.tokens import spread
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

SEQUENCES, LONGEST = 128, 16


class SequenceBias(LogitsProcessor):
    """Adds a sequence's bias to the logit of its last token where the text ends in the others, as in transformers.

    The biases of several sequences that end in the same token are added up.
    """

    def options(self) -> dict[str, RowOption]:
        """`sequence_bias`, of each request."""
        shape = (SEQUENCES, LONGEST + 1)
        return {"sequence_bias": RowOption(-1, torch.float32, shape=shape, reader="biased_sequences")}

    def forward(self, context: LogitContext) -> Processed:
        """The sums of the biases, where there are any."""
        table = context.option("sequence_bias")  # [R, S, L + 1]
        last = completing(context, table[:, :, :-1].to(torch.int64))  # [R, S]
        is_same = last[:, :, None] == last[:, None]  # [R, S, S]
        sums = torch.where(is_same, table[:, None, :, -1], 0).sum(2)  # [R, S]; what has no token is of no use
        bias = spread(last, sums, context.logits.shape[1])  # [R, V]
        return Processed(torch.where(bias == 0, context.logits, context.logits + bias.to(context.logits.dtype)))
