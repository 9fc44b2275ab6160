"""The logits as the model gave them."""

from __future__ import annotations

import torch

from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.probe import Probe, ProbeContext, Probed, ReadingSpec


class OutputLogits(Probe):
    """Tells `logits`, as transformers does: `[V]`, no option applied."""

    def options(self) -> dict[str, RowOption]:
        """`output_logits`."""
        return {"output_logits": RowOption(False, torch.bool)}

    def readings(self, sizes: PartSizes) -> dict[str, ReadingSpec]:
        """`logits` `[V]`."""
        return {"logits": ReadingSpec((sizes.vocabulary,), asked_by="output_logits", of_steps=True)}

    def forward(self, context: ProbeContext) -> Probed:
        """The model's logits behind which each token came."""
        return Probed({"logits": context.raw_logits[context.places]})  # [B, D + 1, V]
