"""An end that becomes likelier with every token."""

from __future__ import annotations

import torch

from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Adds to each EOS its logit's size times factor^n - 1 where a row has n > 0 new tokens beyond `start`.

    As in transformers, but that an EOS which is barred stays barred: there, -inf becomes NaN.
    """

    looks_at_ends = True

    def options(self) -> dict[str, RowOption]:
        """`exponential_decay_length_penalty`, of each request: (start, factor)."""
        option = RowOption(1.0, torch.float32, shape=(2,), reader="start_and_factor")
        return {"exponential_decay_length_penalty": option}

    def forward(self, context: LogitContext) -> Processed:
        """The logits of each EOS with what is added to them."""
        logits, option = context.logits, context.option("exponential_decay_length_penalty")  # [R, V], [R, 2]
        start, factor = option[:, 0], option[:, 1]
        beyond = context.positions - context.prompt_lengths[context.row_ids] - start.to(torch.int64)  # [R]
        growth = factor.pow(beyond.to(torch.float32)) - 1  # [R], rubbish where `beyond` is not above 0
        growth = growth.clamp(max=torch.finfo(torch.float32).max)  # so that a logit of 0 stays one
        grown = (logits + logits.abs() * growth[:, None]).to(logits.dtype)
        applies = (beyond > 0) & (factor != 1)  # [R]
        applies = applies[:, None] & context.is_eos & (logits != -torch.inf)
        return Processed(torch.where(applies, grown, logits))
