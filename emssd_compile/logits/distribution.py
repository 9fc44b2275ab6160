"""What the filters of sampling have in common: they bar tokens by a row's probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(log_probabilities: Tensor) -> Tensor:
    """`[R, 1]`, in nats, of the distributions `[R, V]`; what is impossible adds nothing."""
    probabilities = log_probabilities.exp()
    terms = torch.where(probabilities > 0, probabilities * log_probabilities, 0)  # [R, V]
    return -terms.sum(1, keepdim=True)


def barred(logits: Tensor, where: Tensor) -> Tensor:
    """Logits `[R, V]`, -inf at some places; all others keep their bits."""
    return logits.masked_fill(where, -torch.inf)


def barred_below(logits: Tensor, probabilities: Tensor, least: Tensor) -> Tensor:
    """Logits `[R, V]` without the tokens whose probability is less than `least[R, 1]`; the likeliest stay.

    Args:
        logits: float.
        probabilities: float32 `[R, V]`.
        least: float32 `[R, 1]`; nothing is less than 0.
    """
    return barred(logits, (probabilities < least) & (logits < logits.amax(1, keepdim=True)))
