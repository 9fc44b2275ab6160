"""Tensor functions that `tile_attention` puts into a graph: where tokens lie in tiles and caches, and what they see."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.ops._ancestors import unpack_ancestors
from emssd_compile.ops._scores import AttentionAttributes
from emssd_compile.passes.splice import Tensors


def mark_broken(given: Tensors) -> Tensors:
    """Keys and values whose values are finite: where one is not, the key is NaN in its place.

    A weight of 0 does not hide a value that is not finite; a score is hidden whatever it is.
    """
    keys, values = given["keys"], given["values"]
    nothing = (values * 0).sum(-1, keepdim=True)  # 0, or NaN where a value is not finite
    return {"keys": keys + nothing, "values": torch.where(nothing == 0, values, 0)}


def by_rows(given: Tensors, num_rows: int) -> Tensors:
    """Where the packed tokens of an append lie, row by row: jagged `offsets[B + 1]`, first slots `lengths[B]`."""
    row_ids, slots = given["row_ids"], given["slots"]
    rows = torch.arange(num_rows + 1, device=row_ids.device)
    offsets = (row_ids < rows[:, None]).sum(1)  # [B + 1]
    return {"offsets": offsets, "lengths": slots[offsets[:-1].clamp(max=slots.shape[0] - 1)]}


def moved(given: Tensors) -> Tensors:
    """The keys or values of a path, and where `update_kv` writes them: behind one another, from `starts` on."""
    cache, starts, path = given["cache"], given["starts"], given["path"]
    rows, heads, slots, size = cache.shape
    width = path.shape[1]  # D + 1
    row, head, depth = (torch.arange(length, device=path.device) for length in (rows, heads, width))
    source = (starts[:, None] + path).clamp(0, slots - 1)  # [B, D + 1]
    vectors = (row[:, None, None] * heads + head) * slots + source[:, :, None]  # [B, D + 1, Hkv]
    return {
        "new": torch.embedding(cache.reshape(-1, size), vectors.flatten(0, 1)),  # [B * (D + 1), Hkv, size]
        "row_ids": row[:, None].expand(rows, width).flatten(),
        "slots": (starts[:, None] + depth).flatten(),
        "offsets": torch.arange(rows + 1, device=path.device) * width,
    }


def lay_out(given: Tensors) -> Tensors:
    """Of a tile `tokens`, `rows`, `tile_slots`, `kv_lengths`, as `tile_attention._Tile` has them.

    Row b's tokens end at tile slot S - 1, so slot i holds token `offsets[b + 1] - S + i`.
    """
    offsets, row_ids, row_range = given["offsets"], given["row_ids"], given["row_range"]
    rows, width = given["lengths"].shape[0], row_range.shape[0]
    ends = offsets[1:]
    tokens = (ends[:, None] - width + row_range).clamp(min=0)
    row = row_ids.clamp(max=rows - 1)
    packed = torch.arange(row_ids.shape[0], device=row_ids.device)
    tile_slots = (row + 1) * width - torch.where(row_ids < rows, ends[row] - packed, 1)
    kv_lengths = (given["lengths"] + ends - offsets[:-1]).clamp(min=1)
    return {"tokens": tokens.reshape(-1), "rows": row, "tile_slots": tile_slots, "kv_lengths": kv_lengths}


def pick(given: Tensors, num_rows: int, heads: int) -> Tensors:
    """Where vectors of heads go: `queries` and `results`, as `tile_attention._Picks` has them."""
    tokens, width = given["tokens"], given["row_range"].shape[0]
    head = torch.arange(heads, device=tokens.device)
    queries = tokens.view(num_rows, 1, width) * heads + head[:, None]
    # A place is row * width + slot; with heads it is (row * heads + head) * width + slot.
    results = given["tile_slots"][:, None] + (given["rows"][:, None] * (heads - 1) + head) * width
    return {"queries": queries, "results": results}


def make_mask(given: Tensors, rule: AttentionAttributes, capacity: int, dtype: torch.dtype) -> Tensors:
    """Bool `[B, 1, S, C + 1]`, or with ALiBi `slopes[Hq]` what is added to the scores, `[B, Hq, S, C + 1]`."""
    is_tree = "ancestors" in given
    visible, own, key_positions = (_tree if is_tree else _chain)(given, capacity)
    visible = visible & rule.reaches(own, key_positions)
    if "slopes" in given:
        bias = given["slopes"].to(torch.float32)[:, None, None] * (key_positions - own)[:, None]
        # Half of the lowest number: with a score added to it, it is still finite.
        return {"mask": torch.where(visible[:, None], bias.to(dtype), torch.finfo(dtype).min / 2)}
    if is_tree:  # a query that sees nothing gets slot 0, since a softmax over nothing may be NaN
        first = torch.arange(capacity, device=visible.device) == 0
        visible = visible | (first & ~visible.any(-1, keepdim=True))
    return {"mask": visible[:, None]}


def _chain(given: Tensors, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a query in each tile slot sees, before any window or chunk, where each token follows the one before it.

    Positions of tokens and queries are slots then: the last query's is `kv_lengths - 1`. A tile slot without a token
    counts as one at position 0.

    Returns:
        visible: bool `[B, S, C + 1]`.
        own: `[B, S, 1]`, the position of each query.
        key_positions: the position of the token in each cache slot, in a shape that broadcasts to `[B, S, C + 1]`.
    """
    kv_lengths, row_range = given["kv_lengths"], given["row_range"]
    slots = torch.arange(capacity, device=kv_lengths.device)
    own = (kv_lengths[:, None] - row_range.shape[0] + row_range).clamp(min=0)[:, :, None]
    return slots <= own, own, slots


def _tree(given: Tensors, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_chain`, where the row's tokens of this step are a tree: `emssd::ragged_attention` says who sees whom.

    A tile slot without a token sees what the bits of another row's token say, of this row's tokens.
    """
    lengths, positions, offsets = given["lengths"], given["positions"], given["offsets"]
    rows, width = lengths.shape[0], given["row_range"].shape[0]
    slots = torch.arange(capacity, device=lengths.device)
    step_index = slots - lengths[:, None]  # [B, C + 1], which token of the row's in this step lies in the slot
    committed = step_index < 0
    counts = offsets.diff()[:, None]
    own_index = counts - width + given["row_range"]  # [B, S], which token of the row's the query is; negative: none

    bits = unpack_ancestors(given["ancestors"].index_select(0, given["tokens"])).view(rows, width, -1)
    has_bit = step_index < counts.clamp(max=bits.shape[2])
    index = step_index.clamp(0, bits.shape[2] - 1)[:, None].expand(-1, width, -1)
    in_order = step_index[:, None] <= own_index[:, :, None]
    visible = committed[:, None] | (has_bit[:, None] & bits.gather(2, index))
    visible = visible | ((step_index >= bits.shape[2])[:, None] & in_order)

    step_token = (offsets[:-1, None] + step_index).clamp(0, positions.shape[0] - 1)
    key_positions = torch.where(committed, slots, positions[step_token])
    own = positions.index_select(0, given["tokens"]).view(rows, width)
    return visible, own[:, :, None], key_positions[:, None]
