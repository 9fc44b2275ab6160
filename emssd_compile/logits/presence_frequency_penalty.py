"""Less of what was generated already."""

from __future__ import annotations

import torch

from emssd_compile.logits.tokens import counted
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption


class PresenceFrequencyPenalty(LogitsProcessor):
    """Takes something off the logits of generated tokens: once, and once for each time. The prompt does not count.

    As in OpenAI's interface, and in vLLM.
    """

    def options(self) -> dict[str, RowOption]:
        """`presence_penalty` and `frequency_penalty`, of each request; negative ones favour repetition."""
        penalty = RowOption(0.0, torch.float32, least=-2.0, most=2.0)
        return {"presence_penalty": penalty, "frequency_penalty": penalty}

    def forward(self, context: LogitContext) -> Processed:
        """The logits without the penalties of their tokens."""
        texts = context.texts()  # [R, n]
        place = torch.arange(texts.shape[1], device=texts.device)
        new = torch.where(place < context.prompt_lengths[context.row_ids][:, None], -1, texts)
        counts = counted(new, context.logits.shape[1])  # [R, V]
        presence, frequency = (context.option(f"{name}_penalty")[:, None] for name in ("presence", "frequency"))
        logits = context.logits - counts * frequency - (counts > 0) * presence
        return Processed(logits.to(context.logits.dtype))
