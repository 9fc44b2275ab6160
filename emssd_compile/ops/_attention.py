"""``emssd::attention``: causal attention over one sequence, the one form every L1 graph holds."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from emssd_compile.ops._scores import SCHEMA, AttentionAttributes, accumulation_dtype

torch.library.define(
    "emssd::attention",
    f"(Tensor q, Tensor k, Tensor v, *, {SCHEMA}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(q: Tensor, k: Tensor, v: Tensor, **attributes: Any) -> Tensor:
    """Token ``i`` attends to tokens ``j <= i``; query head ``h`` uses key/value head ``h // (Hq / Hkv)``.

    Args:
        q: ``[1, Hq, T, Dk]``.
        k: ``[1, Hkv, T, Dk]``; ``Hkv`` divides ``Hq``.
        v: ``[1, Hkv, T, Dv]``.
        **attributes: the fields of `AttentionAttributes`; a token's position is its index.

    Returns:
        ``[1, Hq, T, Dv]`` in the dtype of ``q``, laid out as the transpose of a contiguous ``[1, T, Hq, Dv]``, so
        that the reshape to ``[1, T, Hq * Dv]`` which follows in a model is free. Scores and softmax are float32
        (float64 for float64 inputs).
    """
    rule = AttentionAttributes(**attributes)
    batch, _, num_tokens, head_size = q.shape
    dtype = accumulation_dtype(q.dtype)
    grouped_q = q.to(dtype).reshape(batch, k.shape[1], -1, num_tokens, head_size)
    scores = torch.matmul(grouped_q, k.to(dtype).transpose(-1, -2).unsqueeze(2))

    tokens = torch.arange(num_tokens, device=q.device)
    distance = tokens - tokens[:, None]
    visible = (distance <= 0) & rule.reaches(tokens[:, None], tokens)
    weights = rule.weights(scores.flatten(1, 2), distance, visible)
    out = torch.matmul(weights.unflatten(1, (k.shape[1], -1)), v.to(dtype).unsqueeze(2))
    return out.flatten(1, 2).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


torch.library.impl("emssd::attention", "default", reference)


@torch.library.register_fake("emssd::attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, **attributes: Any) -> Tensor:
    batch, num_heads, num_tokens, _ = q.shape
    return q.new_empty(batch, num_tokens, num_heads, v.shape[-1]).transpose(1, 2)


attention: OpOverload = torch.ops.emssd.attention.default
