"""Sampling from the tokens that are about as surprising as a token is on average."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.logits.distribution import barred, entropy
from emssd_compile.logits.temperature import LEAST
from emssd_compile.ops import kept_threshold
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption


def typical(logits: Tensor, typical_p: Tensor) -> Tensor:
    """Logits `[R, V]` of the tokens whose surprise `-log p` is nearest to the entropy and that hold `typical_p` of p.

    The nearest is kept in any case, and of those that are equally near all or none.

    Args:
        logits: float.
        typical_p: float32 `[R]`, from 0 to 1; 1 keeps all.
    """
    log_probabilities = logits.float().log_softmax(1)  # [R, V]
    nearness = -(log_probabilities + entropy(log_probabilities)).abs()  # [R, V], 0 at best
    threshold = kept_threshold(
        nearness, log_probabilities.exp(), torch.zeros_like(typical_p, dtype=torch.int64), typical_p
    )
    return barred(logits, nearness < threshold[:, None])


class TypicalP(LogitsProcessor):
    """Bars tokens that are much more, or much less, surprising than is to be expected (arXiv 2202.00666)."""

    is_filter = True

    def options(self) -> dict[str, RowOption]:
        """`typical_p`, of each request that samples; 1 is off."""
        return {"typical_p": RowOption(1.0, torch.float32, least=LEAST, most=1, needs="do_sample")}

    def forward(self, context: LogitContext) -> Processed:
        """The logits without the tokens that are not typical."""
        return Processed(typical(context.logits, context.options["typical_p"][context.row_ids]))
