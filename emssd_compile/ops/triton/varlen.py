"""``emssd::ragged_attention`` by ``torch.nn.attention.varlen.varlen_attn``, the FlashAttention of PyTorch.

It serves chains in half precision, windows included, but nothing else that changes scores, and slabs only. From torch
2.12 on it takes the number of keys of each row (``seqused_k``), so that a slab per row can be read as it lies.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from emssd_compile.ops._scores import in_use

_MAX_HEAD_SIZE = 256


@functools.cache
def is_available() -> bool:
    """Whether the installed torch has what is needed."""
    return "seqused_k" in inspect.signature(varlen_attn).parameters


def applies(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    ancestors: Tensor | None = None,
    block_table: Tensor | None = None,
    **attributes: Any,
) -> bool:
    """Whether `ragged_attention_varlen` can do what `emssd::ragged_attention` is asked to."""
    plain = in_use(attributes) <= {"scale", "window"} and ancestors is None and block_table is None
    head_size = q.shape[2]
    fits = head_size == v_cache.shape[3] and head_size % 8 == 0 and head_size <= _MAX_HEAD_SIZE
    half = q.dtype in (torch.float16, torch.bfloat16) and k_cache.dtype == q.dtype
    laid_out = k_cache.is_contiguous() and v_cache.is_contiguous() and q.stride(2) == 1
    return is_available() and plain and fits and half and laid_out


@torch.no_grad()
def ragged_attention_varlen(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int = 0,
    **others: Any,
) -> Tensor:
    """Arguments and result as `emssd_compile.ops.ragged_attention` has them.

    `varlen_attn` aligns the causal mask with the last query and the last key of a row, which is a chain behind the
    committed tokens. A token's position is its slot, as in every chain, so `positions` is not needed. Unlike the other
    forms, it lets a value that is not finite reach the earlier tokens of its own row and step.

    Raises:
        ValueError: `applies` says no.
    """
    if not applies(q, k_cache, v_cache, scale=scale, window=window, **others):
        raise ValueError(
            "varlen_attn cannot do this: it needs torch >= 2.12, contiguous float16 or bfloat16 caches, keys and "
            "values of one head size (a multiple of 8, at most 256), and nothing but scale and window besides"
        )
    num_rows, capacity = k_cache.shape[:2]
    row_starts = torch.arange(num_rows + 1, device=q.device, dtype=torch.int32) * capacity
    out = varlen_attn(
        q,
        k_cache.flatten(0, 1),
        v_cache.flatten(0, 1),
        offsets.to(torch.int32),
        row_starts,
        q.shape[0],  # the most that a row's tokens can be; how many they are, the host does not know
        capacity,
        scale=scale,
        window_size=(window - 1 if window > 0 else -1, 0),
        enable_gqa=q.shape[1] != k_cache.shape[2],
        seqused_k=(lengths + offsets.diff()).to(torch.int32),
    )
    assert isinstance(out, Tensor)  # without return_aux
    in_tail = torch.arange(q.shape[0], device=q.device) >= offsets[-1]
    return out.masked_fill_(in_tail[:, None, None], 0.0)  # varlen_attn leaves the tail as the memory was
