"""Sampling from the likeliest tokens that hold a share of the entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.logits.distribution import barred, entropy
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

CONSIDERED = 100
"""How many of the likeliest tokens are looked at, as in transformers; the others are barred."""


def within_entropy(logits: Tensor, top_h: Tensor) -> Tensor:
    """Logits `[R, V]` of the likeliest tokens whose terms `-p log p` add up to no more than a share of the entropy.

    The likeliest token is kept in any case, and of equal logits all or none. Probabilities are those among the 100
    likeliest.

    Args:
        logits: float.
        top_h: float32 `[R]`, the share: 1 keeps all that are looked at, 0 leaves a row as it is.
    """
    wide = logits.float()
    top = wide.topk(min(CONSIDERED, wide.shape[1]), dim=1).values  # [R, 100], descending
    log_probabilities = top.log_softmax(1)
    probabilities = log_probabilities.exp()
    terms = torch.where(probabilities > 0, -probabilities * log_probabilities, 0)
    share = top_h[:, None]
    fits = (terms.cumsum(1) <= share * entropy(log_probabilities)) | (share >= 1)  # [R, 100]; all, however sums round
    fits = fits & (probabilities > 0)
    count = fits[:, 1:].sum(1) + 1  # terms are positive, so those that fit come first
    threshold = top.gather(1, (count - 1)[:, None])  # [R, 1]
    return barred(logits, (wide < threshold) & (share > 0))


class TopH(LogitsProcessor):
    """Keeps fewer tokens the surer the model is: so many that a share of the entropy is theirs.

    The method is that of Potraghloo et al. 2025 (arXiv 2509.02510), as transformers has it.
    """

    is_filter = True

    def options(self) -> dict[str, RowOption]:
        """`top_h`, of each request that samples; 0 is off."""
        return {"top_h": RowOption(0.0, torch.float32, least=0, most=1, needs="do_sample")}

    def forward(self, context: LogitContext) -> Processed:
        """The logits without the tokens beyond each row's share."""
        return Processed(within_entropy(context.logits, context.options["top_h"][context.row_ids]))
