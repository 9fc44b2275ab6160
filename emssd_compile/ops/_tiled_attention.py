"""``emssd::tiled_attention``: a rectangular tile of queries attends to row-wise KV caches of differing lengths."""

import torch
from torch import Tensor
from torch._ops import OpOverload

from emssd_compile.ops._scores import accumulation_dtype, softmax_with_sinks

torch.library.define(
    "emssd::tiled_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_lengths, Tensor? mask, *, float scale, float softcap=0.0,"
    " Tensor? sinks=None, bool is_causal) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lengths: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    is_causal: bool,
) -> Tensor:
    """Attention over row-wise caches, aligned as ONNX (`nonpad_kv_seqlen`) and TensorRT (`LOWER_RIGHT`) have it.

    Args:
        q: ``[B, Hq, S, Dk]``, each row's queries right-aligned: the last one is that of slot ``kv_lengths[b] - 1``.
        k_cache: ``[B, Hkv, C + 1, Dk]``; ``Hkv`` divides ``Hq``, query head ``h`` uses head ``h // (Hq / Hkv)``.
        v_cache: ``[B, Hkv, C + 1, Dv]``, finite below ``kv_lengths``: a weight of 0 hides nothing else.
        kv_lengths: int64 ``[B]``, slots of each row that may be seen; what lies in the others does not matter.
        mask: ``[B, 1 or Hq, S, C + 1]``, bool (whether the query may see the slot) or in the dtype of ``q`` (added to
            the scores after the softcap; half of the lowest number, or less, hides a slot), or None. The key of a
            hidden slot does not matter.
        scale: multiplies the dot products.
        softcap, sinks: as in `AttentionAttributes`.
        is_causal: query ``i`` of row ``b`` sees only slots up to ``kv_lengths[b] - S + i``.

    Returns:
        ``[B, Hq, S, Dv]`` in the dtype of ``q``; zeros where a query sees nothing. Scores and softmax are float32
        (float64 for float64 inputs).
    """
    queries, groups, capacity = q.shape[2], k_cache.shape[1], k_cache.shape[2]
    dtype = accumulation_dtype(q.dtype)
    visible = _visible(kv_lengths, queries, capacity, is_causal=is_causal)
    scores = torch.matmul(q.to(dtype).unflatten(1, (groups, -1)), k_cache.to(dtype).mT.unsqueeze(2)).flatten(1, 2)
    scores = scores * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask
        visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
    weights = softmax_with_sinks(scores.masked_fill(~visible, -torch.inf), sinks).masked_fill(~visible, 0.0)
    # A slot that nobody wrote may hold NaN, and 0 * NaN is NaN.
    unused = torch.arange(capacity, device=q.device) >= kv_lengths[:, None]
    values = v_cache.to(dtype).masked_fill(unused[:, None, :, None], 0.0)
    return torch.matmul(weights.unflatten(1, (groups, -1)), values.unsqueeze(2)).flatten(1, 2).to(q.dtype)


def _visible(kv_lengths: Tensor, queries: int, capacity: int, *, is_causal: bool) -> Tensor:
    """Bool ``[B, 1, S, C + 1]``: which slots a query sees by its row's length alone."""
    slots = torch.arange(capacity, device=kv_lengths.device)
    last = (kv_lengths - 1)[:, None].expand(-1, queries)
    if is_causal:
        last = last + torch.arange(1 - queries, 1, device=kv_lengths.device)
    return (slots <= last[:, :, None])[:, None]


torch.library.impl("emssd::tiled_attention", "default", reference)


@torch.library.register_fake("emssd::tiled_attention")
def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lengths: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    is_causal: bool,
) -> Tensor:
    return q.new_empty((*q.shape[:3], v_cache.shape[-1]))


tiled_attention: OpOverload = torch.ops.emssd.tiled_attention.default
