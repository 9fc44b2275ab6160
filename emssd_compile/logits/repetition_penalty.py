"""Less of what is in the text already."""

from __future__ import annotations

import torch

from emssd_compile.logits.tokens import among
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

LEAST = 2.0**-100  # above 0; and what it divides stays finite


class RepetitionPenalty(LogitsProcessor):
    """Divides the logits of tokens that the text holds, prompt included, and multiplies them where they are negative.

    As in transformers; the method is that of CTRL (Keskar et al. 2019, section 4.1).
    """

    def options(self) -> dict[str, RowOption]:
        """`repetition_penalty`, of each request; less than 1 favours repetition."""
        return {"repetition_penalty": RowOption(1.0, torch.float32, least=LEAST, most=2.0**100)}

    def forward(self, context: LogitContext) -> Processed:
        """The logits of tokens that were seen, with the penalty."""
        logits, penalty = context.logits, context.option("repetition_penalty")[:, None]
        seen = among(context.texts(), logits.shape[1])  # [R, V]
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty).to(logits.dtype)
        return Processed(torch.where(seen, penalised, logits))
