"""The part of attention that every form shares: from raw scores to attention weights."""

import torch
from torch import Tensor


def attention_weights(
    scores: Tensor,
    distance: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Softmax over the visible keys; a query that sees no key gets zeros.

    Args:
        scores: ``[..., Hq, Tq, S]``, the dot product of each query with each key, float32 or float64.
        distance: ``[Tq, S]``, key position minus query position, in tokens.
        visible: bool ``[Tq, S]``, whether the query may see the key.
        scale: multiplies the scores.
        softcap: if positive, scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, section 2).
        alibi_slopes: ``[Hq]``, adds ``slope * distance`` (ALiBi, Press et al. 2022, section 3), or None.

    Returns:
        Weights of the shape and dtype of ``scores``; exactly 0 where not visible.
    """
    scores = scores * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(scores.dtype)[:, None, None] * distance
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    # A query without any visible key comes out of softmax as NaN; this makes it zeros.
    return weights.masked_fill(~visible, 0.0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)
