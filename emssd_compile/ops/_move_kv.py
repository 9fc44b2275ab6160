"""``emssd::move_kv``: put the keys and values of a draft tree's accepted path behind the committed ones, in place."""

import torch
from torch import Tensor
from torch._ops import OpOverload

torch.library.define(
    "emssd::move_kv",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor starts, Tensor path, Tensor counts, Tensor? block_table=None)"
    " -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    path: Tensor,
    counts: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """``cache[b, starts[b] + i] = cache[b, starts[b] + path[b, i]]`` for ``i < counts[b]``, ascending, in both caches.

    A row of 5 committed tokens has fed a root, node 0, and drafts; the path 0, 2, 3 is accepted. What lay in slots
    5, 7 and 8 then lies in 5, 6 and 7: ``starts = [5], path = [[0, 2, 3]], counts = [3]``.

    Args:
        k_cache: ``[B, C, Hkv, Dk]``, or with a `block_table` ``[blocks, P, Hkv, Dk]``; changed in place.
        v_cache: ``[B, C, Hkv, Dv]`` or ``[blocks, P, Hkv, Dv]``, changed in place.
        starts: int64 ``[B]``, the slot of each row's node 0.
        path: int64 ``[B, N]``, the node accepted at each depth: strictly ascending, so ``path[b, i] >= i``, and no
            token is overwritten before it is moved. What lies past ``counts`` does not matter.
        counts: int64 ``[B]``, tokens to move; of a row with 0, ``starts`` does not matter.
        block_table: int32 ``[B, M]``, as `emssd_compile.ops.ragged_attention` has it.
    """
    # The number of moves depends on data, that of writes must not. A row without any repeats those of a row that has
    # some, what is past a row's moves repeats the last of them, and where nothing moves what is there is written back.
    has_moves = counts > 0
    row = torch.where(has_moves, torch.arange(len(counts), device=counts.device), has_moves.to(torch.int64).argmax())
    starts, path, counts = starts[row, None], path[row], counts[row, None]
    depth = torch.minimum(torch.arange(path.shape[1], device=path.device), (counts - 1).clamp(min=0))  # [B, N]
    node = torch.where(counts > 0, path.gather(1, depth), depth)
    for cache in (k_cache, v_cache):
        size = cache.shape[1]
        last = size * (1 if block_table is None else block_table.shape[1]) - 1
        target, source = ((starts + index).clamp(0, last) for index in (depth, node))
        if block_table is None:
            cache.index_put_((row[:, None], target), cache[row[:, None], source])
        else:
            blocks = block_table.clamp(min=0)[row]  # [B, M]
            target_blocks, source_blocks = (blocks.gather(1, slots // size) for slots in (target, source))
            cache.index_put_((target_blocks, target % size), cache[source_blocks, source % size])


torch.library.impl("emssd::move_kv", "default", reference)


@torch.library.register_fake("emssd::move_kv")
def _fake(
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    path: Tensor,
    counts: Tensor,
    block_table: Tensor | None = None,
) -> None:
    return None


move_kv: OpOverload = torch.ops.emssd.move_kv.default
