"""``emssd::append_kv``: write the keys and values of a step's packed tokens into the rows' caches, in place."""

import torch
from torch import Tensor
from torch._ops import OpOverload

from emssd_compile.ops._packed_kv import DTYPE, pack_kv

torch.library.define(
    "emssd::append_kv",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor row_ids, Tensor slots) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, row_ids: Tensor, slots: Tensor) -> None:
    """``k_cache[row_ids[t], slots[t]] = k[t]``, and the same for ``v``, for every token that has a row.

    Where rows keep their tokens in blocks of a pool (`emssd_compile.ops.ragged_attention`), B is the number of blocks
    and C their size: `row_ids` are then the blocks that tokens go to, and `slots` places in them.

    Args:
        k_cache: ``[B, C, Hkv, Dk]``, changed in place; or int8 ``[B, C, Hkv, Dk + 4]``, for packed vectors
            (`_packed_kv`).
        v_cache: ``[B, C, Hkv, Dv]`` or int8 ``[B, C, Hkv, Dv + 4]``, changed in place.
        k: ``[T, Hkv, Dk]``, in the dtype of ``k_cache`` if that holds no packed vectors.
        v: ``[T, Hkv, Dv]``, in that of ``v_cache``.
        row_ids: int64 ``[T]``, the row of each token; ``B`` marks an inert tail token, which writes nothing.
        slots: int64 ``[T]``, the cache slot of each token in its row. No two tokens may share row and slot.
    """
    if row_ids.shape[0] == 0:
        return
    # An inert token cannot be dropped without a data-dependent shape. It repeats the write of a live token instead,
    # or, where no token is live, writes back what is there.
    live = row_ids < k_cache.shape[0]
    tokens = torch.arange(row_ids.shape[0], device=row_ids.device)
    source = torch.where(live, tokens, live.to(torch.int64).argmax())
    any_live = live.any()
    index = (torch.where(any_live, row_ids[source], 0), torch.where(any_live, slots[source], 0))
    for cache, given in ((k_cache, k), (v_cache, v)):
        new = pack_kv(given) if cache.dtype == DTYPE else given
        cache.index_put_(index, torch.where(any_live, new[source], cache[index]))


torch.library.impl("emssd::append_kv", "default", reference)


@torch.library.register_fake("emssd::append_kv")
def _fake(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, row_ids: Tensor, slots: Tensor) -> None:
    return None


append_kv: OpOverload = torch.ops.emssd.append_kv.default
