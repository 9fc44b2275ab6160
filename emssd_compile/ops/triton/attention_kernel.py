"""Ragged attention on a GPU: flash attention over packed queries, each row with its own part of the KV cache.

That part is a slab, or blocks of a pool that a table names.

A program holds one tile of queries (a row's tokens times the query heads of one KV head) and walks over the row's slots
in blocks, with a running softmax (Milakov and Gimelshein 2018, algorithm 3). So the bytes of each key and value are
read once per KV head and tile, and a row costs what it holds: with few tokens per row the kernel should reach the
bandwidth of the memory, `Hkv * (Dk + Dv) * itemsize` bytes per visible slot. Where rows are few and long, their slots
are split among programs whose results `merge_splits` weighs by their log-sum-exp (Flash-Decoding, Dao et al. 2023).

Nothing here depends on other rows: with the same sizes a row's result has the same bits, whatever the others hold.

Scores are kept in units of log2, since a GPU has exp2 and no exp: the launcher scales scores, caps, slopes and sinks to
that.
"""

import triton
import triton.language as tl

from emssd_compile.ops._ancestors import WORD_BITS
from emssd_compile.ops.triton.packed_kv import aligned, load_scales

_WORD_BITS = tl.constexpr(WORD_BITS)
# Sizes that differ from step to step: Triton would compile anew where one happens to be 1 or a multiple of 16.
_UNSPECIALIZED = ["num_tokens", "num_rows", "num_splits", "capacity", "window", "chunk", "ancestor_words", "row_blocks"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def attend(
    q,
    k_cache,
    v_cache,
    out,  # [num_splits, T, Hq, Dv], normalised within each split
    logsumexp,  # [num_splits, T, Hq], or None if there is one split
    offsets,
    lengths,
    positions,
    alibi_slopes,  # [Hq] in log2, or None
    sinks,  # [Hq] in log2, or None; with several splits, `merge_splits` has them
    ancestors,  # int32 [T, ancestor_words], or None for chains
    block_table,  # int32 [B, row_blocks], or None where each row has a slab
    q_strides,
    k_strides,
    v_strides,
    num_tokens,
    num_rows,
    num_splits,
    capacity,
    window,  # or None
    chunk,  # or None
    ancestor_words,
    row_blocks,
    score_scale,
    score_cap,  # or None
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PAGE: tl.constexpr,  # slots of a block of the pool
    ALIGNED: tl.constexpr,  # packed vectors lie at multiples of `packed_kv.ALIGNMENT`
):
    """One tile of queries, one KV head, one split of the row's slots."""
    if ALIGNED:
        k_strides, v_strides = aligned(k_strides), aligned(v_strides)
    row, begin, end, first_query = _find_tile(
        tl.program_id(0), offsets, num_rows, num_tokens, GROUP, BLOCK_ROWS, BLOCK_QUERIES
    )
    kv_head, split = tl.program_id(1), tl.program_id(2)
    num_queries = (end - begin) * GROUP
    if first_query >= num_queries:
        return
    query = first_query + tl.arange(0, BLOCK_QUERIES)
    valid = query < num_queries
    step_index = query // GROUP  # which token of its row in this step
    token = begin + step_index
    head = kv_head * GROUP + query % GROUP
    place = (split.to(tl.int64) * num_tokens + token) * (tl.num_programs(1) * GROUP) + head
    value_dims = tl.arange(0, BLOCK_VALUE)
    out_pointers = out + place[:, None] * VALUE_SIZE + value_dims[None, :]
    out_mask = valid[:, None] & (value_dims < VALUE_SIZE)[None, :]
    if row == num_rows:  # the tail of T
        if logsumexp is None:
            tl.store(out_pointers, tl.zeros([BLOCK_QUERIES, BLOCK_VALUE], out.dtype.element_ty), mask=out_mask)
        return

    length = tl.load(lengths + row).to(tl.int32)
    first_slot = 0
    stop_token = (tl.minimum(first_query + BLOCK_QUERIES, num_queries) - 1) // GROUP + 1
    if ancestors is not None:
        stop_token = tl.maximum(stop_token, tl.minimum(end - begin, ancestor_words * _WORD_BITS))
    stop_slot = tl.minimum(length + stop_token, capacity)
    # From here to `seen_by_all_stop` every query of the tile sees every slot.
    seen_by_all = first_slot
    position = step_index
    if window is not None or chunk is not None or alibi_slopes is not None:
        position = tl.load(positions + token, mask=valid, other=0).to(tl.int32)
    first_seen = None
    if window is not None or chunk is not None:
        first_seen = _first_seen(position, window, chunk)
        lowest = tl.minimum(tl.min(tl.where(valid, first_seen, capacity)), length)
        highest = tl.minimum(tl.max(tl.where(valid, first_seen, 0)), length)
        first_slot = lowest // BLOCK_SLOTS * BLOCK_SLOTS
        seen_by_all = tl.cdiv(highest, BLOCK_SLOTS) * BLOCK_SLOTS

    blocks_per_split = tl.cdiv(tl.cdiv(stop_slot - first_slot, BLOCK_SLOTS), num_splits)
    first_slot += split * blocks_per_split * BLOCK_SLOTS
    stop_slot = tl.minimum(first_slot + blocks_per_split * BLOCK_SLOTS, stop_slot)
    if first_slot >= stop_slot:
        if logsumexp is None:
            tl.store(out_pointers, tl.zeros([BLOCK_QUERIES, BLOCK_VALUE], out.dtype.element_ty), mask=out_mask)
        else:
            tl.store(logsumexp + place, tl.full([BLOCK_QUERIES], float("-inf"), tl.float32), mask=valid)
        return
    seen_by_all_stop = tl.maximum(tl.minimum(length // BLOCK_SLOTS * BLOCK_SLOTS, stop_slot), first_slot)
    seen_by_all = tl.minimum(tl.maximum(seen_by_all, first_slot), seen_by_all_stop)

    head_dims = tl.arange(0, BLOCK_HEAD)
    first_dims = q + token.to(tl.int64) * q_strides[0] + head * q_strides[1]
    queries = tl.load(
        first_dims[:, None] + head_dims[None, :] * q_strides[2],
        mask=valid[:, None] & (head_dims < HEAD_SIZE)[None, :],
        other=0.0,
    )
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=valid, other=0.0)
    if ancestors is not None:
        ancestors += token.to(tl.int64) * ancestor_words
    keys = k_cache + kv_head * k_strides[2]
    values = v_cache + kv_head * v_strides[2]
    if block_table is None:
        keys += row.to(tl.int64) * k_strides[0]
        values += row.to(tl.int64) * v_strides[0]
    else:
        block_table += row.to(tl.int64) * row_blocks

    acc = tl.zeros([BLOCK_QUERIES, BLOCK_VALUE], tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    peak = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    bounds = (first_slot, seen_by_all, seen_by_all_stop, stop_slot)
    for part in tl.static_range(3):
        if part > 0 or first_seen is not None:
            acc, total, peak = _attend_slots(
                acc, total, peak, bounds[part], bounds[part + 1], queries, keys, values, k_strides, v_strides,
                step_index, position, first_seen, slope, length, end - begin, positions + begin, ancestors,
                ancestor_words, block_table, score_scale, score_cap,
                HEAD_SIZE, VALUE_SIZE, BLOCK_SLOTS, BLOCK_HEAD, BLOCK_VALUE, PAGE, MASKED=part != 1,
            )  # fmt: skip

    if sinks is not None and logsumexp is None:
        sink = tl.load(sinks + head, mask=valid, other=0.0)
        top = tl.maximum(peak, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        acc *= tl.exp2(peak - base)[:, None]
        total = total * tl.exp2(peak - base) + tl.exp2(sink - base)
    result = acc / tl.where(total == 0, 1.0, total)[:, None]  # a query that sees nothing gets zeros
    tl.store(out_pointers, result.to(out.dtype.element_ty), mask=out_mask)
    if logsumexp is not None:
        tl.store(logsumexp + place, peak + tl.log2(total), mask=valid)


@triton.jit
def _find_tile(
    tile,
    offsets,
    num_rows,
    num_tokens,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """The tile's row (`num_rows` is the tail), the row's tokens `begin .. end - 1`, the tile's first query in the row.

    Tiles are numbered as `launch.max_tiles` says. Past the row's last query, the tile is not needed.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    starts = tl.load(offsets + rows, mask=rows <= num_rows, other=0).to(tl.int32)
    numbered_before = (rows <= num_rows) & (starts * GROUP // BLOCK_QUERIES + rows <= tile)
    row = tl.sum(numbered_before.to(tl.int32)) - 1
    begin = tl.load(offsets + row).to(tl.int32)
    end = tl.load(offsets + row + 1, mask=row < num_rows, other=num_tokens).to(tl.int32)
    first_query = (tile - row - begin * GROUP // BLOCK_QUERIES) * BLOCK_QUERIES
    return row, begin, end, first_query


@triton.jit
def _attend_slots(
    acc, total, peak, first_slot, stop_slot, queries, keys, values, k_strides, v_strides,
    step_index, position, first_seen, slope, length, num_step, step_positions, ancestors,
    ancestor_words, block_table, score_scale, score_cap,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the slots `first_slot .. stop_slot - 1` to the running sums; without MASKED every query sees all of them."""
    block = tl.arange(0, BLOCK_SLOTS)
    head_dims, value_dims = tl.arange(0, BLOCK_HEAD), tl.arange(0, BLOCK_VALUE)
    PACKED: tl.constexpr = keys.dtype.element_ty == tl.int8
    key_scales, value_scales = keys + HEAD_SIZE, values + VALUE_SIZE  # where they lie in packed vectors
    keys += head_dims[:, None] * k_strides[3]
    values += value_dims[None, :] * v_strides[3]
    if block_table is None:
        first_slots = first_slot.to(tl.int64) + block
        keys += first_slots[None, :] * k_strides[1]
        values += first_slots[:, None] * v_strides[1]
    # The words of ancestors are loaded query by slot: to prefetch those would take more shared memory than there is.
    STAGES: tl.constexpr = 1 if MASKED and ancestors is not None else None
    for start in tl.range(first_slot, stop_slot, BLOCK_SLOTS, num_stages=STAGES):
        slots = start + block
        key_mask = (head_dims < HEAD_SIZE)[:, None]
        value_mask = (value_dims < VALUE_SIZE)[None, :]
        slot_mask = slots < stop_slot
        if MASKED:
            key_mask &= slot_mask[None, :]
            value_mask &= slot_mask[:, None]
        if block_table is None:
            k = tl.load(keys, mask=key_mask, other=0)
            line = slots.to(tl.int64) * k_strides[1]
        else:
            number = tl.load(block_table + slots // PAGE, mask=slot_mask, other=-1).to(tl.int64)
            slot_mask &= number >= 0  # what a GPU cannot report must at least not be another row's
            key_mask &= slot_mask[None, :]
            value_mask &= slot_mask[:, None]
            line = number * k_strides[0] + (slots % PAGE) * k_strides[1]
            k = tl.load(keys + line[None, :], mask=key_mask, other=0)
        if PACKED:
            k = (k.to(tl.float32) * load_scales(key_scales + line, slot_mask)[None, :]).to(queries.dtype)
        scores = tl.dot(queries, k, input_precision="ieee") * score_scale
        if score_cap is not None:
            scores = score_cap * _tanh(scores)
        key_position = slots
        if MASKED and (first_seen is not None or slope is not None):
            in_step = (slots >= length) & (slots < stop_slot)
            key_position = tl.load(step_positions + (slots - length), mask=in_step, other=0).to(tl.int32)
            key_position = tl.where(slots < length, slots, key_position)
        if slope is not None:
            scores += slope[:, None] * (key_position[None, :] - position[:, None]).to(tl.float32)
        if MASKED:
            visible = _visible(slots, step_index, length, num_step, ancestors, ancestor_words)
            visible &= (slots < stop_slot)[None, :]
            if first_seen is not None:
                visible &= key_position[None, :] >= first_seen[:, None]
            scores = tl.where(visible, scores, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing seen yet: -inf - -inf would be NaN
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak

        if block_table is None:
            v = tl.load(values, mask=value_mask, other=0)
            line = slots.to(tl.int64) * v_strides[1]
        else:
            line = number * v_strides[0] + (slots % PAGE) * v_strides[1]
            v = tl.load(values + line[:, None], mask=value_mask, other=0)
        if PACKED:
            v = (v.to(tl.float32) * load_scales(value_scales + line, slot_mask)[:, None]).to(queries.dtype)
        if MASKED:
            # A weight of 0 does not hide what is not finite, and a rejected draft may overflow: taken out for all
            # queries of the tile, and given back as NaN to those who see it.
            finite = tl.abs(v.to(tl.float32)) < float("inf")
            v = tl.where(finite, v, tl.zeros_like(v))
            broken = tl.min(finite.to(tl.int32), 1) == 0
            sees_broken = tl.max((visible & broken[None, :]).to(tl.int32), 1) == 1
            total = tl.where(sees_broken, float("nan"), total)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        if block_table is None:
            keys += BLOCK_SLOTS * k_strides[1]
            values += BLOCK_SLOTS * v_strides[1]
    return acc, total, peak


@triton.jit
def _visible(slots, step_index, length, num_step, ancestors, ancestor_words):
    """Whether each query sees each slot, before any window or chunk and up to the row's last slot."""
    column = slots - length
    visible = column[None, :] <= step_index[:, None]
    if ancestors is not None:
        has_bit = ((column >= 0) & (column < ancestor_words * _WORD_BITS))[None, :]
        valid = (step_index < num_step)[:, None]  # the last tile of a row reaches past its tokens
        words = ancestors[:, None] + (column // _WORD_BITS)[None, :]
        words = tl.load(words, mask=valid & has_bit, other=0)
        bit = (column & (_WORD_BITS - 1))[None, :]  # unlike a remainder, never negative: such a shift has no meaning
        visible = tl.where(has_bit, (words >> bit) & 1 != 0, visible)
    return visible


@triton.jit
def _tanh(x):
    """Accurate to the rounding of 1, as a capped score is to that of its cap. Triton has no tanh of its own."""
    decay = tl.exp2(tl.abs(x) * (-2 * 1.4426950408889634))
    magnitude = (1 - decay) / (1 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _first_seen(position, window, chunk):
    """Position of the first key that a query sees, by its window and its chunk; never less for a later query."""
    first = tl.zeros_like(position)
    if window is not None:
        first = tl.maximum(first, position - window + 1)
    if chunk is not None:
        first = tl.maximum(first, position // chunk * chunk)
    return first
