"""``emssd::attention``: causal attention over one sequence, the one form every L1 graph holds."""

import torch
from torch import Tensor
from torch._ops import OpOverload

from emssd_compile.ops._scores import accumulation_dtype, attention_weights

torch.library.define(
    "emssd::attention",
    "(Tensor q, Tensor k, Tensor v, *, float scale, int window=0, float softcap=0.0, Tensor? alibi_slopes=None)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Token ``i`` attends to tokens ``j <= i``; query head ``h`` uses key/value head ``h // (Hq / Hkv)``.

    Args:
        q: ``[1, Hq, T, Dk]``.
        k: ``[1, Hkv, T, Dk]``; ``Hkv`` divides ``Hq``.
        v: ``[1, Hkv, T, Dv]``.
        scale: multiplies the dot products.
        window: if positive, only ``i - window < j`` is seen (sliding window, in tokens).
        softcap: if positive, caps the scaled scores with ``softcap * tanh(score / softcap)``.
        alibi_slopes: ``[Hq]``, adds ``slope * (j - i)`` after the softcap, or None.

    Returns:
        ``[1, Hq, T, Dv]`` in the dtype of ``q``, laid out as the transpose of a contiguous ``[1, T, Hq, Dv]``, so
        that the reshape to ``[1, T, Hq * Dv]`` which follows in a model is free. Scores and softmax are float32
        (float64 for float64 inputs).
    """
    batch, _, num_tokens, head_size = q.shape
    dtype = accumulation_dtype(q.dtype)
    grouped_q = q.to(dtype).reshape(batch, k.shape[1], -1, num_tokens, head_size)
    scores = torch.matmul(grouped_q, k.to(dtype).transpose(-1, -2).unsqueeze(2))

    tokens = torch.arange(num_tokens, device=q.device)
    distance = tokens - tokens[:, None]
    visible = distance <= 0
    if window > 0:
        visible = visible & (distance > -window)

    weights = attention_weights(
        scores.flatten(1, 2), distance, visible, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes
    )
    out = torch.matmul(weights.unflatten(1, (k.shape[1], -1)), v.to(dtype).unsqueeze(2))
    return out.flatten(1, 2).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


torch.library.impl("emssd::attention", "default", reference)


@torch.library.register_fake("emssd::attention")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    batch, num_heads, num_tokens, _ = q.shape
    return q.new_empty(batch, num_tokens, num_heads, v.shape[-1]).transpose(1, 2)


attention: OpOverload = torch.ops.emssd.attention.default
