"""``emssd::update_kv``: a row-wise KV cache with a step's packed tokens written into it, as a new value."""

import torch
from torch import Tensor
from torch._ops import OpOverload

torch.library.define(
    "emssd::update_kv",
    "(Tensor cache, Tensor new, Tensor row_ids, Tensor slots, Tensor offsets, Tensor lengths) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(cache: Tensor, new: Tensor, row_ids: Tensor, slots: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
    """``result[row_ids[t], :, slots[t]] = new[t]`` for every token that has a row.

    `emssd::append_kv` for runtimes whose graphs hold values rather than memory: they write in place where the result is
    bound to the memory of the cache. What they scatter by differs, so the tokens' places are given twice: token by
    token (`row_ids`, `slots`) and row by row (`offsets`, `lengths`).

    Args:
        cache: ``[B, Hkv, C + 1, D]``, heads before tokens; the last slot of a row is scratch, which no row reads.
        new: ``[T, Hkv, D]``, keys or values in the dtype of ``cache``.
        row_ids: int64 ``[T]``, the row of each token; ``B`` marks an inert tail token, which goes to a scratch slot.
        slots: int64 ``[T]``, the cache slot of each token in its row. No two tokens may share row and slot.
        offsets: int64 ``[B + 1]``, jagged offsets of the rows in ``T``.
        lengths: int64 ``[B]``, slots of each row written before: the first of the row's tokens goes to this one.

    Returns:
        ``[B, Hkv, C + 1, D]``.
    """
    rows, _, capacity, _ = cache.shape
    slots = torch.where(row_ids < rows, slots, capacity - 1)
    result = cache.clone()
    result[row_ids.clamp(max=rows - 1), :, slots] = new
    return result


torch.library.impl("emssd::update_kv", "default", reference)


@torch.library.register_fake("emssd::update_kv")
def _fake(cache: Tensor, new: Tensor, row_ids: Tensor, slots: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(cache)


update_kv: OpOverload = torch.ops.emssd.update_kv.default
