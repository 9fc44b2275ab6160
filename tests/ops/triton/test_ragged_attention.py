import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile import ops
from emssd_compile.ops.triton.launch import AttentionSizes, Processors, plan_launch
from tests.ops.ragged import Batch, Heads, in_blocks, in_rings, make_batch, oracle, spoilt, with_random_bits, with_trees
from tests.ops.triton_process import SHARED_MEMORY, TritonProcess, needs_triton

pytestmark = needs_triton

ROWS = [(37, 3), (0, 1), (5, 0), (16, 2)]  # an empty row, no history, ends inside and at a block of slots
SMALL = {"block_slots": 16, "block_queries": 16}  # several blocks and tiles in few slots and tokens
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([0.5, -2.0, 9.0, -torch.inf])

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "window across blocks": {"window": 30},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": SLOPES},
    "chunk": {"chunk": 5},
    "chunk across blocks": {"chunk": 30},
    "sinks": {"sinks": SINKS},
    "window and chunk": {"window": 9, "chunk": 12},
    "all": {"window": 23, "chunk": 25, "softcap": 3.0, "alibi_slopes": SLOPES, "sinks": SINKS},
}


@pytest.fixture(scope="module")
def triton() -> Iterator[TritonProcess]:
    process = TritonProcess()
    yield process
    process.close()


def assert_exact(result: Tensor, expected: Tensor) -> None:
    """Equal up to float32 sums, or to inputs of the second product that are rounded to half precision."""
    eps = 0.0 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=eps, atol=max(2e-6, eps / 2))


@pytest.mark.parametrize("heads", [
    Heads(4, 4, 64, 64),
    Heads(4, 1, 80, 80),
    Heads(8, 1, 96, 96),
    Heads(16, 2, 128, 128),
    Heads(3, 1, 40, 24),
    Heads(2, 2, 7, 33),
    Heads(35, 1, 16, 16),  # a group wider than a tile of queries
], ids=str)  # fmt: skip
def test_matches_oracle_for_all_head_shapes(triton: TritonProcess, heads: Heads) -> None:
    batch = with_trees(make_batch([(17, 3), (0, 2)], heads, tail=1))
    assert_exact(triton.attend(batch, **SMALL), oracle(batch))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_oracle_for_all_options(
    triton: TritonProcess, options: dict[str, object], tree: bool, splits: int
) -> None:
    batch = make_batch(ROWS, Heads(4, 2, 16, 16), tail=1)
    batch = (with_trees(batch) if tree else batch).with_options(**options)
    result = triton.attend(batch, **SMALL, num_splits=splits)
    assert_exact(result, oracle(batch))
    assert torch.equal(triton.attend(in_blocks(batch, 4 if tree else 64), **SMALL, num_splits=splits), result)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_ring_has_what_a_window_sees(triton: TritonProcess, tree: bool) -> None:
    batch = make_batch(ROWS, Heads(4, 2, 16, 16), tail=1)
    batch = with_trees(batch) if tree else batch
    result = triton.attend(batch.with_options(window=9), **SMALL, num_splits=3)
    assert torch.equal(triton.attend(in_rings(batch, 4, 9), **SMALL, num_splits=3), result)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_oracle_in_half_precision(triton: TritonProcess, dtype: torch.dtype, splits: int) -> None:
    batch = make_batch(ROWS, Heads(4, 2, 40, 40), tail=1, dtype=dtype)
    result = triton.attend(batch, num_splits=splits)
    assert result.dtype == dtype
    assert_exact(result, oracle(batch))


@pytest.mark.parametrize("rows", [[(0, 1)], [(15, 1)], [(16, 1)], [(0, 0), (0, 0)], [(0, 20)], [(5, 0)]], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_matches_oracle_for_one_row_and_for_none(
    triton: TritonProcess, rows: list[tuple[int, int]], splits: int
) -> None:
    batch = make_batch(rows, Heads(2, 1, 16, 16), tail=20 if rows == [(0, 0), (0, 0)] else 0)
    result = triton.attend(batch, **SMALL, num_splits=splits)
    assert result.shape == batch.q.shape
    assert_exact(result, oracle(batch))


@pytest.mark.parametrize("rows", [[(10, 40), (9, 0), (3, 70)], [(5, 33)], [(0, 0), (0, 64), (2, 1)]], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_trees_of_several_query_tiles_and_words(
    triton: TritonProcess, rows: list[tuple[int, int]], splits: int
) -> None:
    batch = with_trees(make_batch(rows, Heads(1, 1, 16, 16), tail=1))
    assert_exact(triton.attend(batch, **SMALL, num_splits=splits), oracle(batch))


@settings(max_examples=12)
@given(
    rows=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), min_size=1, max_size=4),
    heads=st.sampled_from([Heads(2, 2, 8, 8), Heads(4, 1, 16, 8), Heads(3, 1, 33, 20)]),
    tail=st.integers(1, 20),
    window=st.sampled_from([0, 1, 4, 30]),
    softcap=st.sampled_from([0.0, 2.0]),
    chunk=st.sampled_from([0, 1, 5, 30]),
    sinks=st.booleans(),
    alibi=st.booleans(),
    tree=st.booleans(),
    splits=st.integers(1, 4),
    page=st.sampled_from([None, 1, 16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_oracle_for_random_schedules(
    triton: TritonProcess,
    rows: list[tuple[int, int]],
    heads: Heads,
    tail: int,
    window: int,
    softcap: float,
    chunk: int,
    sinks: bool,
    alibi: bool,
    tree: bool,
    splits: int,
    page: int | None,
    seed: int,
) -> None:
    batch = make_batch(rows, heads, tail=tail, seed=seed)
    batch = with_trees(batch, seed=seed) if tree else batch
    slopes = torch.linspace(0.1, 1.0, heads.num_heads) if alibi else None
    batch = batch.with_options(window=window, chunk=chunk, softcap=softcap, alibi_slopes=slopes)
    batch = batch.with_options(sinks=torch.linspace(-2.0, 3.0, heads.num_heads)) if sinks else batch
    held = in_blocks(batch, page) if page else batch
    assert_exact(triton.attend(held, **SMALL, num_splits=splits), oracle(batch))


def test_any_strides(triton: TritonProcess) -> None:
    batch = make_batch([(20, 2)], Heads(4, 2, 16, 16))
    expected = triton.attend(batch, **SMALL)
    fused = torch.cat([batch.q, batch.q], dim=1)[:, 4:]  # a slice of a fused projection
    head_major = batch.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    scattered = batch.v_cache.transpose(1, 3).contiguous().transpose(1, 3)
    result = triton.attend(replace(batch, q=fused, k_cache=head_major, v_cache=scattered), **SMALL)
    assert torch.equal(result, expected)
    assert result.is_contiguous()


@pytest.mark.parametrize("splits", [1, 2])
def test_other_rows_change_no_bit(triton: TritonProcess, splits: int) -> None:
    batch = make_batch([(30, 3), (40, 2), (7, 1)], Heads(2, 1, 16, 16), tail=2)
    other = make_batch([(3, 0), (40, 2), (20, 5)], Heads(2, 1, 16, 16), tail=1, seed=1)
    other.k_cache[1, :42], other.v_cache[1, :42], other.q[:2] = (
        batch.k_cache[1, :42],
        batch.v_cache[1, :42],
        batch.q[3:5],
    )
    expected = triton.attend(batch, **SMALL, num_splits=splits)[3:5]
    assert torch.equal(triton.attend(other, **SMALL, num_splits=splits)[:2], expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_later_token_cannot_reach_an_earlier_one(triton: TritonProcess, value: float) -> None:
    """Not even with keys and values that would turn every sum into NaN, as a rejected draft's may."""
    batch = make_batch([(20, 4)], Heads(2, 1, 16, 16))
    expected = triton.attend(batch, **SMALL)
    batch.k_cache[0, 22:24] = value
    batch.v_cache[0, 22:24] = value
    result = triton.attend(batch, **SMALL)
    assert torch.equal(result[:2], expected[:2])
    assert result[2:].isnan().all()


@pytest.mark.parametrize("splits", [1, 2])
def test_nan_in_a_committed_key_or_value_is_not_hidden(triton: TritonProcess, splits: int) -> None:
    batch = make_batch([(20, 1), (20, 1), (20, 1)], Heads(2, 1, 16, 16))
    batch.k_cache[1, 3] = math.nan
    batch.v_cache[2, 18] = math.nan
    result = triton.attend(batch, **SMALL, num_splits=splits)
    assert result[0].isfinite().all()
    assert result[1:].isnan().all()


@pytest.mark.parametrize("splits", [1, 2])
def test_a_block_of_another_row_is_not_read(triton: TritonProcess, splits: int) -> None:
    batch = in_blocks(make_batch([(40, 3), (20, 1)], Heads(2, 1, 16, 16)), 16)
    expected = triton.attend(batch, **SMALL, num_splits=splits)
    for value in (math.nan, 1e30):
        result = triton.attend(spoilt(batch, 0, value), **SMALL, num_splits=splits)
        assert torch.equal(result[:3], expected[:3])


def test_blocks_that_there_are_not_read_nothing(triton: TritonProcess) -> None:
    batch = in_blocks(make_batch([(40, 3)], Heads(2, 1, 16, 16)), 16)
    lost = batch.with_options(block_table=torch.full((1, 3), -1, dtype=torch.int32))
    assert triton.attend(lost, **SMALL).eq(0).all()


def test_large_scores_do_not_overflow(triton: TritonProcess) -> None:
    batch = make_batch([(40, 2)], Heads(2, 1, 16, 16)).with_options(scale=1000.0)
    assert_exact(triton.attend(batch, **SMALL, num_splits=2), oracle(batch))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"chunk": 50}, {"alibi_slopes": SLOPES[:2]}], ids=str)
def test_a_long_prompt_is_read_in_order_beside_trees(
    triton: TritonProcess, options: dict[str, object], splits: int
) -> None:
    batch = with_trees(make_batch([(20, 30), (40, 100), (0, 33)], Heads(2, 1, 16, 16), tail=2), words=1)
    batch = batch.with_options(**options)
    assert_exact(triton.attend(batch, **SMALL, num_splits=splits), oracle(batch))


def test_tokens_without_a_bit_see_those_before_them_and_of_the_others_what_their_bits_say(
    triton: TritonProcess,
) -> None:
    batch = with_random_bits(make_batch([(10, 40), (3, 70), (0, 20)], Heads(1, 1, 16, 16)))
    assert_exact(triton.attend(batch, **SMALL), oracle(batch))


def test_a_chain_has_the_same_bits_however_it_is_said(triton: TritonProcess) -> None:
    batch = make_batch([(20, 70), (40, 7)], Heads(1, 1, 16, 16))
    chain = torch.ones(70, 32, dtype=torch.bool).tril()
    tree = batch.with_options(ancestors=ops.pack_ancestors(torch.cat([chain, chain[:7]])))
    assert torch.equal(triton.attend(tree, **SMALL), triton.attend(batch, **SMALL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions \[T\] do not fit"),
        ({"q": torch.zeros(4, 4, 31)}, r"q \[T, Hq, Dk\].* do not fit"),
        ({"q": torch.zeros(4, 4, 32, dtype=torch.float16)}, "of one dtype among float32, bfloat16 and float16"),
        ({"options": {"scale": 1.0, "sinks": torch.ones(3)}}, r"sinks \[Hq\] do not fit"),
        ({"options": {"scale": 1.0, "ancestors": torch.ones(4, 4, dtype=torch.bool)}}, r"ancestors int32 \[T, W\]"),
        ({"options": {"scale": 1.0, "block_table": torch.zeros(2, 2)}}, r"block_table int32 \[B, M\]"),
    ],
)
def test_refuses_what_does_not_fit(triton: TritonProcess, change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        triton.attend(replace(make_batch([(8, 2), (3, 2)]), **change))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compiler() -> Iterator[TritonProcess]:
    process = TritonProcess(capability=90)
    yield process
    process.close()


COMPILED: dict[str, Batch] = {
    "bfloat16 blocks": in_blocks(make_batch([(200, 2)], Heads(4, 2, 16, 16), dtype=torch.bfloat16), 64),
    "float32 chain": make_batch([(200, 2)], Heads(4, 2, 16, 16)),
    "bfloat16 chain": make_batch([(200, 2)], Heads(4, 2, 16, 16), dtype=torch.bfloat16),
    "bfloat16 tree with all": with_trees(make_batch([(30, 2)], Heads(4, 2, 24, 16), dtype=torch.bfloat16)).with_options(
        window=9, chunk=12, softcap=2.0, alibi_slopes=SLOPES, sinks=SINKS
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_a_gpu(compiler: TritonProcess, name: str) -> None:
    """The interpreter lets pass what the compiler refuses; this needs no GPU."""
    compiler.attend(COMPILED[name], num_splits=2)
    assert [kernel for kernel, *_ in compiler.launched()] == ["attend", "merge_splits"]


WIDE = {
    "bfloat16 blocks": in_blocks(make_batch([(700, 8)], Heads(8, 2, 128, 128), dtype=torch.bfloat16), 64),
    "float32 blocks": in_blocks(make_batch([(700, 8)], Heads(8, 2, 256, 256)), 64),
    "float32 chain": make_batch([(700, 8)], Heads(8, 2, 256, 256)),
    "bfloat16 chain": make_batch([(700, 8)], Heads(8, 2, 128, 128), dtype=torch.bfloat16).with_options(window=70),
    "bfloat16 tree": with_trees(make_batch([(700, 40)], Heads(8, 2, 64, 64), dtype=torch.bfloat16)),
    "bfloat16 tree, wide": with_trees(make_batch([(70, 40)], Heads(8, 2, 256, 256), dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("capability", [89, 90])
def test_shared_memory_is_no_more_than_planned_with(capability: int) -> None:
    compiler = TritonProcess(capability)
    for name, batch in WIDE.items():
        compiler.attend(batch)
        rows, num_tokens, num_heads, dtype = len(batch.lengths), *batch.q.shape[:2], batch.q.dtype
        _, capacity, num_kv_heads, head_size = batch.k_cache.shape
        table = batch.options.get("block_table")
        capacity *= table.shape[1] if isinstance(table, Tensor) else 1
        sizes = AttentionSizes(num_tokens, rows, capacity, num_heads, num_kv_heads, head_size, head_size, dtype)
        planned = plan_launch(sizes, Processors(132, SHARED_MEMORY[capability])).shared_memory(sizes)
        assert max(shared for *_, shared in compiler.launched()) <= planned <= SHARED_MEMORY[capability], name
    compiler.close()


def test_grid_and_kernels_do_not_depend_on_data(compiler: TritonProcess) -> None:
    """Else a captured CUDA graph would not serve the next step."""
    heads = Heads(4, 2, 16, 16)
    launches = []
    for rows, tail in ([(150, 1), (0, 1)], 10), ([(3, 12), (7, 0)], 0), ([(0, 0), (2, 0)], 12):
        batch = make_batch(rows, heads, tail=tail)
        caches = torch.empty(2, 160, 2, 16)
        compiler.attend(replace(batch, k_cache=caches, v_cache=caches))
        launches.append(compiler.launched())
    assert launches[0] == launches[1] == launches[2]
