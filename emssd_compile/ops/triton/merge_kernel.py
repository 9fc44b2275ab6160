"""The second half of ragged attention where the slots of a row are split among programs (Flash-Decoding)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits(
    partial,  # [num_splits, T, Hq, Dv]
    logsumexp,  # [num_splits, T, Hq]; -inf where a split holds nothing, and its part of `partial` is not written
    out,  # [T, Hq, Dv]
    sinks,  # [Hq] in log2, or None
    num_live,  # offsets[B]
    num_splits,
    NUM_HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """One query: the mean of its splits, weighed by what they and the sink hold. A tail token gets zeros."""
    query, num_queries = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    splits = tl.arange(0, BLOCK_SPLITS)
    live = (splits < num_splits) & (query // NUM_HEADS < tl.load(num_live))
    place = splits * num_queries + query
    lse = tl.load(logsumexp + place, mask=live, other=float("-inf"))
    peak = tl.max(lse, 0)
    if sinks is not None:
        sink = tl.load(sinks + query % NUM_HEADS)
        peak = tl.maximum(peak, sink)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(lse - base)
    total = tl.sum(weights, 0)
    if sinks is not None:
        total += tl.exp2(sink - base)
    value_dims = tl.arange(0, BLOCK_VALUE)
    inside = value_dims < VALUE_SIZE
    parts = tl.load(
        partial + place[:, None] * VALUE_SIZE + value_dims[None, :],
        mask=(lse != float("-inf"))[:, None] & inside[None, :],
        other=0.0,
    )
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + query * VALUE_SIZE + value_dims, result.to(out.dtype.element_ty), mask=inside)
