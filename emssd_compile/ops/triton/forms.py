"""What the ops call on a GPU."""

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from emssd_compile.ops import _ragged_attention
from emssd_compile.ops._scores import in_use
from emssd_compile.ops.triton.append_kv import append_kv_triton
from emssd_compile.ops.triton.move_kv import move_kv_triton
from emssd_compile.ops.triton.ragged_attention import ATTRIBUTES, DTYPES, ragged_attention_triton
from emssd_compile.ops.triton.selection import Selection, cuda_milliseconds
from emssd_compile.ops.triton.varlen import applies, ragged_attention_varlen

append_kv = append_kv_triton
move_kv = move_kv_triton
attention_selection = Selection(cuda_milliseconds, lambda: not torch.cuda.is_current_stream_capturing())


def ragged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    positions: Tensor,
    **options: Any,
) -> Tensor:
    """`emssd::ragged_attention` by the fastest form that can do it; by the reference where none can, as in float64."""
    tensors = (q, k_cache, v_cache, offsets, lengths, positions)
    if q.dtype not in DTYPES or in_use(options) - ATTRIBUTES:
        return _ragged_attention.reference(*tensors, **options)
    forms = {"triton": functools.partial(ragged_attention_triton, *tensors, **options)}
    if applies(q, k_cache, v_cache, **options):
        forms["varlen_attn"] = functools.partial(ragged_attention_varlen, *tensors, **options)
    with torch.cuda.device_of(q):  # events, and the question whether a graph is captured, are of the current device
        return attention_selection.run(_call_class(q, k_cache, options), forms)


def _call_class(q: Tensor, k_cache: Tensor, options: Mapping[str, object]) -> Hashable:
    """Calls alike enough to have one fastest form: the numbers of tokens up to the next power of two are one class."""
    tokens = 1 << max(0, q.shape[0] - 1).bit_length()
    kind = tuple(sorted((name, isinstance(value, Tensor) or value) for name, value in options.items()))
    return tokens, q.shape[1:], k_cache.shape, kind, q.dtype, q.device
