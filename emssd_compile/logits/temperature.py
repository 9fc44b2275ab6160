"""How far sampling strays from the likeliest token."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

LEAST = 2.0**-100  # above 0; and what it divides stays finite


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits `[R, V]` over `temperature[R]`, in the dtype of the logits; 1 leaves every bit as it is."""
    return (logits / temperature[:, None]).to(logits.dtype)


class Temperature(LogitsProcessor):
    """Divides the logits: above 0 and below 1 it sharpens the distribution, above 1 it flattens it."""

    is_filter = True

    def options(self) -> dict[str, RowOption]:
        """`temperature`, of each request that samples: also of one that does not say, so that most share one form."""
        return {"temperature": RowOption(1.0, torch.float32, least=LEAST, needs="do_sample", implied=1.0)}

    def forward(self, context: LogitContext) -> Processed:
        """The logits of each row over its temperature."""
        return Processed(tempered(context.logits, context.options["temperature"][context.row_ids]))
