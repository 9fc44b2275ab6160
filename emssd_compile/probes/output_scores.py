"""The logits that tokens were chosen by."""

from __future__ import annotations

import torch

from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.probe import Probe, ProbeContext, Probed, ReadingSpec


class OutputScores(Probe):
    """Tells `scores`, as transformers does: logits `[V]` with all options applied, -inf for what they bar."""

    def options(self) -> dict[str, RowOption]:
        """`output_scores`."""
        return {"output_scores": RowOption(False, torch.bool)}

    def readings(self, sizes: PartSizes) -> dict[str, ReadingSpec]:
        """`scores` `[V]`."""
        return {"scores": ReadingSpec((sizes.vocabulary,), asked_by="output_scores", of_steps=True)}

    def forward(self, context: ProbeContext) -> Probed:
        """The processed logits behind which each token came."""
        return Probed({"scores": context.logits[context.places]})  # [B, D + 1, V]
