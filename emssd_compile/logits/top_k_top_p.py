"""Sampling from the likeliest tokens: so many of them, or so much of the probability."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.logits.distribution import barred
from emssd_compile.ops import kept_threshold
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

TRANSFORMERS_TOP_K = 50
"""What a request that samples and does not say gets, there and here."""


def filtered(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits `[R, V]` of the `top_k` likeliest tokens, and of these the likeliest that hold `top_p` of what they hold.

    The likeliest token is kept in any case, and of equal logits all or none.

    Args:
        logits: float; compared in float32.
        top_k: int64 `[R]`; 0 keeps all.
        top_p: float32 `[R]`, from 0 to 1; 1 keeps all.
    """
    keys = logits.float()
    weights = (keys - keys.amax(1, keepdim=True)).exp()  # [R, V], probabilities but for a factor
    threshold = kept_threshold(keys, weights, top_k, top_p)  # [R]
    return barred(logits, keys < threshold[:, None])


class TopKTopP(LogitsProcessor):
    """Bars what is not among the `top_k` likeliest tokens, then what is not in the nucleus of those that are left.

    Both at once, since they cut at one threshold. Top-k is that of Fan et al. 2018 (arXiv 1805.04833), top-p that of
    Holtzman et al. 2019 (arXiv 1904.09751).
    """

    is_filter = True

    def options(self) -> dict[str, RowOption]:
        """`top_k` (0 is off) and `top_p` (1 is off), of each request that samples."""
        return {
            "top_k": RowOption(0, least=0, needs="do_sample", implied=TRANSFORMERS_TOP_K),
            "top_p": RowOption(1.0, torch.float32, least=0, most=1, needs="do_sample"),
        }

    def forward(self, context: LogitContext) -> Processed:
        """The logits without the tokens below each row's threshold."""
        top_k, top_p = (context.options[name][context.row_ids] for name in ("top_k", "top_p"))
        return Processed(filtered(context.logits, top_k, top_p))
