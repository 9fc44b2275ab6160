import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile import ops
from tests.ops.ragged import Batch, Heads, in_blocks, in_rings, make_batch, oracle, spoilt, with_random_bits, with_trees

ROWS = [(70, 3), (0, 1), (5, 0), (129, 5), (64, 1), (60, 4)]  # an empty row, no history, ends around a block of keys

HEADS = [
    Heads(4, 4, 32, 32),
    Heads(4, 1, 64, 64),
    Heads(8, 1, 80, 80),
    Heads(8, 2, 96, 96),
    Heads(2, 2, 128, 128),
    Heads(6, 2, 40, 40),
    Heads(4, 2, 48, 24),
    Heads(2, 1, 7, 5),
    Heads(35, 1, 16, 16),  # a group wider than a tile of queries
]

SINKS = torch.tensor([0.5, -2.0, 9.0, -torch.inf])  # of little weight, of next to all, of none

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "window across blocks": {"window": 66},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "chunk": {"chunk": 16},
    "chunk of one": {"chunk": 1},
    "chunk across blocks": {"chunk": 67},
    "sinks": {"sinks": SINKS},
    "window and chunk": {"window": 9, "chunk": 16},
    "all": {
        "window": 33,
        "chunk": 40,
        "softcap": 3.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "sinks": SINKS,
    },
}


def attend(batch: Batch) -> Tensor:
    result: Tensor = ops.ragged_attention(*batch.tensors, **batch.options)
    return result


def assert_same_in_blocks(batch: Batch, kernels: str = "cpp", sizes: Sequence[int] = (1, 16, 64, 128)) -> None:
    """The bits of slabs, whatever the size of blocks; of the reference, which sums over all slots, up to rounding."""
    expected = attend(batch)
    for size in sizes:
        result = attend(in_blocks(batch, size))
        if kernels == "cpp":
            assert torch.equal(result, expected)
        else:
            torch.testing.assert_close(result, expected)


def seconds(batch: Batch) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        attend(batch)
        times.append(time.perf_counter() - start)
    return min(times)


def assert_exact(result: Tensor, expected: Tensor) -> None:
    """Equal up to rounding to the result's dtype, and to the rounding of float32 sums."""
    in_double = result.dtype == torch.float64
    eps = 0.0 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=0.51 * eps, atol=1e-13 if in_double else 2e-6)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_matches_oracle_for_all_head_shapes(kernels: str, heads: Heads, tree: bool) -> None:
    batch = make_batch(ROWS, heads, tail=2)
    batch = with_trees(batch) if tree else batch
    assert_exact(attend(batch), oracle(batch))
    assert_same_in_blocks(batch, kernels)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_oracle_for_all_options(kernels: str, options: dict[str, object], tree: bool) -> None:
    batch = make_batch(ROWS, tail=1)
    batch = (with_trees(batch) if tree else batch).with_options(**options)
    assert_exact(attend(batch), oracle(batch))
    assert_same_in_blocks(batch, kernels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [64, 40])
def test_matches_oracle_for_all_dtypes(kernels: str, dtype: torch.dtype, head_size: int) -> None:
    batch = make_batch(ROWS, Heads(4, 2, head_size, head_size), tail=1, dtype=dtype)
    result = attend(batch)
    assert result.dtype == dtype
    assert_exact(result, oracle(batch))
    assert_same_in_blocks(batch, kernels)


@pytest.mark.parametrize("rows", [[(0, 1)], [(63, 1)], [(64, 1)], [(0, 0), (0, 0)], [(0, 70)], [(60, 40)]], ids=str)
def test_matches_oracle_for_one_row_and_for_none(kernels: str, rows: list[tuple[int, int]]) -> None:
    batch = make_batch(rows, tail=1 if rows == [(0, 0), (0, 0)] else 0)
    assert_exact(attend(batch), oracle(batch))


@pytest.mark.parametrize("rows", [[(40, 40), (9, 0), (3, 35)], [(5, 33)], [(0, 0), (60, 70), (2, 1)]], ids=str)
def test_trees_of_several_query_tiles_and_words(kernels: str, rows: list[tuple[int, int]]) -> None:
    batch = with_trees(make_batch(rows, Heads(2, 1, 16, 16), tail=1))
    assert_exact(attend(batch), oracle(batch))


def test_no_tokens_at_all(cpu_kernels: None) -> None:
    assert attend(make_batch([(4, 0)])).shape == (0, 4, 32)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 6)), min_size=1, max_size=5),
    heads=st.sampled_from([Heads(2, 2, 8, 8), Heads(4, 1, 16, 8), Heads(3, 1, 33, 20)]),
    tail=st.integers(1, 3),
    window=st.sampled_from([0, 1, 4, 70]),
    softcap=st.sampled_from([0.0, 2.0]),
    chunk=st.sampled_from([0, 1, 5, 64, 70]),
    sinks=st.booleans(),
    alibi=st.booleans(),
    tree=st.booleans(),
    page=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_oracle_for_random_schedules(
    cpu_kernels: None,
    rows: list[tuple[int, int]],
    heads: Heads,
    tail: int,
    window: int,
    softcap: float,
    chunk: int,
    sinks: bool,
    alibi: bool,
    tree: bool,
    page: int,
    seed: int,
) -> None:
    batch = make_batch(rows, heads, tail=tail, seed=seed)
    batch = with_trees(batch, seed=seed) if tree else batch
    slopes = torch.linspace(0.1, 1.0, heads.num_heads) if alibi else None
    batch = batch.with_options(window=window, chunk=chunk, softcap=softcap, alibi_slopes=slopes)
    batch = batch.with_options(sinks=torch.linspace(-2.0, 3.0, heads.num_heads)) if sinks else batch
    assert_exact(attend(batch), oracle(batch))
    assert_same_in_blocks(batch, sizes=[page])


def test_long_rows_match_oracle(cpu_kernels: None) -> None:
    batch = make_batch([(2100, 2), (1023, 1)], Heads(2, 1, 16, 16))
    assert_exact(attend(batch), oracle(batch))
    for option in ({"window": 1050}, {"chunk": 1050}, {"sinks": torch.tensor([1.0, -1.0])}):
        assert_exact(attend(batch.with_options(**option)), oracle(batch.with_options(**option)))
        assert_same_in_blocks(batch.with_options(**option), sizes=[64])


@pytest.mark.parametrize("window", [1, 9, 70])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_ring_has_what_a_window_sees(kernels: str, tree: bool, window: int) -> None:
    """Its columns name the same blocks again and again; what has been written over is seen by nobody."""
    batch = make_batch([(300, 7), (0, 20), (150, 0), (64, 1)], tail=2)
    batch = with_trees(batch) if tree else batch
    expected = attend(batch.with_options(window=window))
    for size in (1, 4, 64):
        result = attend(in_rings(batch, size, window))
        torch.testing.assert_close(result, expected, rtol=0, atol=0 if kernels == "cpp" else 1e-6)


def test_rows_that_begin_alike_may_share_blocks(kernels: str) -> None:
    batch = make_batch([(70, 3), (100, 1), (33, 2)])
    for cache in (batch.k_cache, batch.v_cache):
        cache[1:, :32] = cache[0, :32]
    torch.testing.assert_close(attend(in_blocks(batch, 16, shared=2)), attend(batch), rtol=0, atol=1e-6)


def test_a_block_of_another_row_is_not_read(kernels: str) -> None:
    """NaN, and what would change any sum, in all that the row does not own."""
    batch = in_blocks(make_batch([(70, 3), (100, 1)]), 16)
    for value in (math.nan, 1e30):
        assert torch.equal(attend(spoilt(batch, 0, value))[:3], attend(batch)[:3])


@pytest.mark.parametrize("option", [{"chunk": 64}, {"window": 64}], ids=str)
def test_what_lies_before_the_chunk_or_window_is_not_read(cpu_kernels: None, option: dict[str, object]) -> None:
    """A long row costs what its queries can see."""
    batch = make_batch([(120_000, 1)], Heads(2, 1, 64, 64))
    assert seconds(batch.with_options(**option)) < seconds(batch) / 10


def test_a_long_prompt_costs_no_more_beside_trees(cpu_kernels: None) -> None:
    batch = make_batch([(0, 1500)], Heads(8, 2, 64, 64))
    assert seconds(with_trees(batch, words=1)) < 1.5 * seconds(batch)


def test_any_strides(kernels: str) -> None:
    batch = make_batch(ROWS, Heads(4, 2, 32, 32))
    expected = attend(batch)
    fused = torch.cat([batch.q, batch.q], dim=1)[:, 4:]  # a slice of a fused projection
    head_major = batch.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    scattered = batch.v_cache.transpose(1, 3).contiguous().transpose(1, 3)  # last dimension not contiguous
    assert scattered.stride(-1) != 1
    result = attend(replace(batch, q=fused, k_cache=head_major, v_cache=scattered))
    assert torch.equal(result, expected)
    assert result.is_contiguous()


def test_other_rows_and_tail_change_no_bit(cpu_kernels: None) -> None:
    batch = make_batch([(70, 3), (129, 5), (30, 0)], tail=2)
    other = make_batch([(1500, 9), (129, 5), (8, 1)], tail=7, seed=1)
    expected = attend(batch)[3:8]
    for cache, source in ((other.k_cache, batch.k_cache), (other.v_cache, batch.v_cache)):
        cache[1, :134] = source[1, :134]
    other.q[9:14] = batch.q[3:8]
    assert torch.equal(attend(other)[9:14], expected)
    alone = replace(
        batch,
        q=batch.q[3:8],
        k_cache=batch.k_cache[1:2],
        v_cache=batch.v_cache[1:2],
        offsets=torch.tensor([0, 5]),
        lengths=batch.lengths[1:2],
        positions=batch.positions[3:8],
    )
    assert torch.equal(attend(alone), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tokens_one_by_one_have_the_bits_of_all_at_once(cpu_kernels: None, options: dict[str, object]) -> None:
    """Speculation, chunked prefill and plain decoding agree to the bit on a token's attention."""
    length, count = 1000, 60
    batch = make_batch([(length, count)]).with_options(**options)
    together = attend(batch)
    for i in range(count):
        single = replace(
            batch,
            q=batch.q[i : i + 1],
            offsets=torch.tensor([0, 1]),
            lengths=torch.tensor([length + i]),
            positions=batch.positions[i : i + 1],
        )
        assert torch.equal(attend(single)[0], together[i])


def test_number_of_threads_changes_no_bit(cpu_kernels: None) -> None:
    batch = make_batch([(3000, 2), (100, 1)], Heads(4, 1, 32, 32))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(attend(batch))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_later_token_cannot_reach_an_earlier_one(kernels: str, value: float) -> None:
    """Not even with keys and values that would turn every sum into NaN."""
    batch = make_batch([(20, 4)])
    expected = attend(batch)
    batch.k_cache[0, 22:24] = value
    batch.v_cache[0, 22:24] = value
    result = attend(batch)
    assert torch.equal(result[:2], expected[:2])
    assert result[2:].isnan().all()


@pytest.mark.parametrize("scale", [0.2, 30.0])
def test_nan_in_a_committed_key_is_not_hidden(kernels: str, scale: float) -> None:
    batch = make_batch([(20, 1), (20, 1)]).with_options(scale=scale)
    batch.k_cache[1, 3] = math.nan
    result = attend(batch)
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


def test_large_scores_do_not_overflow(kernels: str) -> None:
    batch = make_batch([(200, 2)]).with_options(scale=1000.0)
    assert_exact(attend(batch), oracle(batch))


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"chunk": 50}, OPTIONS["all"]], ids=str)
@pytest.mark.parametrize("words", [1, 2])
def test_a_long_prompt_is_read_in_order_beside_trees(kernels: str, options: dict[str, object], words: int) -> None:
    rows = [(20, 30), (50, 150), (0, 33), (0, 65), (3, 1)]
    batch = with_trees(make_batch(rows, tail=2), words=words).with_options(**options)
    assert_exact(attend(batch), oracle(batch))


def test_tokens_without_a_bit_see_those_before_them_and_of_the_others_what_their_bits_say(kernels: str) -> None:
    batch = with_random_bits(make_batch([(10, 40), (3, 90), (0, 20)]))
    assert_exact(attend(batch), oracle(batch))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_chain_has_the_same_bits_however_it_is_said(cpu_kernels: None, options: dict[str, object]) -> None:
    batch = make_batch([(70, 200), (100, 7), (0, 33)]).with_options(**options)
    expected = attend(batch)
    for words in (1, 3):
        chain = torch.ones(200, 32 * words, dtype=torch.bool).tril()
        mask = torch.cat([chain, chain[:7], chain[:33]])
        assert torch.equal(attend(batch.with_options(ancestors=ops.pack_ancestors(mask))), expected)


def test_gradient_mode_is_no_obstacle(kernels: str) -> None:
    batch = make_batch([(10, 3)])
    expected = attend(batch)
    with torch.no_grad():
        assert torch.equal(attend(replace(batch, q=batch.q.requires_grad_())), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([12, 3])}, "row 0 has 12 committed and 2 new tokens, its cache holds 13"),
        ({"offsets": torch.tensor([0, 2, 1])}, "offsets decrease at row 1"),
        ({"offsets": torch.tensor([0, 2, 9])}, "offsets must run from 0 to at most 4 tokens"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions \[T\] do not fit"),
        ({"q": torch.zeros(4, 4, 31)}, r"q \[T, Hq, Dk\].* do not fit"),
        ({"q": torch.zeros(4, 4, 32, dtype=torch.float16)}, "must have one dtype"),
    ],
)
def test_cpp_form_refuses_what_would_reach_outside(cpu_kernels: None, change: dict[str, Tensor], message: str) -> None:
    batch = make_batch([(8, 2), (3, 2)])
    with pytest.raises(RuntimeError, match=message):
        attend(replace(batch, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be \[Hq\], got \[3\] for 4 heads"),
        ({"sinks": torch.ones(8)}, r"sinks must be \[Hq\], got \[8\] for 4 heads"),
        ({"ancestors": torch.ones(3, 2, dtype=torch.int32)}, r"must be Int \[T, W\], got Int \[3, 2\] for 4 tokens"),
        ({"ancestors": torch.ones(4, 2, dtype=torch.bool)}, r"must be Int \[T, W\], got Bool \[4, 2\] for 4 tokens"),
    ],
)
def test_cpp_form_refuses_options_of_another_shape(cpu_kernels: None, option: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        attend(make_batch([(8, 2), (3, 2)]).with_options(**option))


TABLE = torch.tensor([[0], [1]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.long(), r"block_table must be Int \[B, M\], got Long \[2, 1\] for 2 rows"),
        (TABLE[:1], r"block_table must be Int \[B, M\], got Int \[1, 1\] for 2 rows"),
        (TABLE - 1, "slots 0 to 12 of row 0 are in block -1; there are 2 blocks"),
        (TABLE + 1, "slots 0 to 12 of row 1 are in block 2; there are 2 blocks"),
    ],
)
def test_cpp_form_refuses_blocks_that_there_are_not(cpu_kernels: None, table: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        attend(make_batch([(8, 2), (3, 2)]).with_options(block_table=table))


@pytest.mark.parametrize("blocks", [False, True], ids=["slabs", "blocks"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_opcheck(kernels: str, tree: bool, blocks: bool) -> None:
    batch = make_batch(ROWS, Heads(4, 2, 16, 8), tail=2)
    batch = (with_trees(batch) if tree else batch).with_options(**OPTIONS["all"])
    batch = in_blocks(batch, 16) if blocks else batch
    torch.library.opcheck(ops.ragged_attention, batch.tensors, batch.options)
