"""``emssd::ragged_attention``: packed query tokens attend to their own row's KV cache, with no padding anywhere."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from emssd_compile.ops._ancestors import unpack_ancestors
from emssd_compile.ops._packed_kv import DTYPE, unpack_kv, vector_size
from emssd_compile.ops._scores import SCHEMA, AttentionAttributes, accumulation_dtype

torch.library.define(
    "emssd::ragged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor offsets, Tensor lengths, Tensor positions, *,"
    f" {SCHEMA}, Tensor? ancestors=None, Tensor? block_table=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    ancestors: Tensor | None = None,
    block_table: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """Each token attends to its row's committed slots and to its ancestors among the row's tokens of this step.

    Row ``b`` owns the packed tokens ``offsets[b] .. offsets[b + 1] - 1``; its ``i``-th token lies in cache slot
    ``lengths[b] + i``, where `emssd::append_kv` has put it before. Committed slot ``s < lengths[b]`` holds the token at
    position ``s``. Slots past a row's last token are never looked at, whatever they hold.

    Rows may share a pool of blocks instead of having a slab of C slots each: slot ``s`` of row ``b`` then lies in block
    ``block_table[b, s // P]`` at place ``s % P``, and C is ``M * P``. Blocks of a row past its last token are never
    looked at, nor are their numbers.

    Args:
        q: ``[T, Hq, Dk]``.
        k_cache: ``[B, C, Hkv, Dk]``, or with a `block_table` ``[blocks, P, Hkv, Dk]``; ``Hkv`` divides ``Hq``, query
            head ``h`` uses key/value head ``h // (Hq / Hkv)``.
        v_cache: ``[B, C, Hkv, Dv]`` or ``[blocks, P, Hkv, Dv]``. Both may hold packed vectors (`_packed_kv`): int8, and
            4 bytes longer.
        offsets: int64 ``[B + 1]``, jagged offsets of the rows in ``T``. Tokens from ``offsets[B]`` on are inert tail.
        lengths: int64 ``[B]``, committed tokens of each row.
        positions: int64 ``[T]``, true position of each token in its row.
        ancestors: int32 ``[T, W]``, made by `pack_ancestors`: bit ``j % 32`` of word ``j // 32`` says whether token
            ``t`` sees the ``j``-th token of its row in this step (itself included). Tokens from ``32 * W`` on have no
            bit: each of them is seen by itself and those behind it, so a prompt may be longer than any tree. None is
            a chain: every token sees itself and those before it.
        block_table: int32 ``[B, M]``, the number of each row's ``m``-th block; -1 where it has none. Rows that begin
            alike may share blocks.
        **attributes: the fields of `AttentionAttributes`.

    Returns:
        ``[T, Hq, Dv]`` contiguous, in the dtype of ``q``; zeros for tail tokens. Scores, softmax and sums are float32
        (float64 for float64 inputs).
    """
    rule = AttentionAttributes(**attributes)
    dtype, num_kv_heads, num_rows = accumulation_dtype(q.dtype), k_cache.shape[2], lengths.shape[0]
    if block_table is not None:
        k_cache, v_cache = (cache[block_table.clamp(min=0)].flatten(1, 2) for cache in (k_cache, v_cache))
    capacity = k_cache.shape[1]
    row, key_positions, visible = _sight(offsets, lengths, positions, capacity, ancestors)
    visible = visible & rule.reaches(positions[:, None], key_positions)

    row = row.clamp(max=num_rows - 1)  # a tail token reads some row, but sees nothing of it
    keys = _read(k_cache[row], dtype)
    # A slot nobody wrote may hold NaN, and 0 * NaN is NaN.
    values = _read(v_cache[row], dtype).masked_fill(~visible[:, :, None, None], 0.0)
    scores = torch.einsum("tkgd,tskd->kgts", q.to(dtype).unflatten(1, (num_kv_heads, -1)), keys)
    weights = rule.weights(scores.flatten(0, 1), key_positions - positions[:, None], visible)
    out = torch.einsum("kgts,tskd->tkgd", weights.unflatten(0, (num_kv_heads, -1)), values)
    return out.flatten(1, 2).to(q.dtype).contiguous()


def _read(held: Tensor, dtype: torch.dtype) -> Tensor:
    return unpack_kv(held, dtype) if held.dtype == DTYPE else held.to(dtype)


def _sight(
    offsets: Tensor, lengths: Tensor, positions: Tensor, capacity: int, ancestors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What each token sees, before any window or chunk.

    Returns:
        row: ``[T]``, the row of each token; ``B`` for tail tokens.
        key_positions: ``[T, C]``, position of the key in each slot of the token's row.
        visible: bool ``[T, C]``.
    """
    tokens = torch.arange(positions.shape[0], device=positions.device)
    slots = torch.arange(capacity, device=positions.device)
    row = torch.searchsorted(offsets, tokens, right=True) - 1
    in_tail = row == lengths.shape[0]
    own_row = row.clamp(max=lengths.shape[0] - 1)
    begin, end, length = offsets[own_row], offsets[own_row + 1], lengths[own_row]

    committed = slots < length[:, None]
    step_index = slots - length[:, None]  # which token of this step lies in the slot
    in_step = (step_index >= 0) & (step_index < (end - begin)[:, None])
    seen = step_index <= (tokens - begin)[:, None]
    if ancestors is not None:
        mask = unpack_ancestors(ancestors)
        last = mask.shape[1] - 1
        seen = torch.where(step_index <= last, mask.gather(1, step_index.clamp(0, last)), seen)
    visible = (committed | (in_step & seen)) & ~in_tail[:, None]

    step_token = (begin[:, None] + step_index).clamp(0, positions.shape[0] - 1)
    key_positions = torch.where(committed, slots, positions[step_token])
    return row, key_positions, visible


torch.library.impl("emssd::ragged_attention", "default", reference)


@torch.library.register_fake("emssd::ragged_attention")
def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    ancestors: Tensor | None = None,
    block_table: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], vector_size(v_cache))


ragged_attention: OpOverload = torch.ops.emssd.ragged_attention.default
