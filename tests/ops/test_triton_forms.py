"""The ops on a real GPU, as a model calls them."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from emssd_compile import ops
from emssd_compile.ops import _ragged_attention
from emssd_compile.ops._packed_kv import SCALE_BYTES, pack_kv, unpack_kv
from tests.ops.moves import expected_caches, make_moves, same_bits
from tests.ops.ragged import Batch, Heads, in_blocks, make_batch, with_trees

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOPES = torch.linspace(0.05, 0.5, 8)
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 70},
    "softcap": {"softcap": 20.0},
    "alibi": {"alibi_slopes": SLOPES},
    "chunk": {"chunk": 70},
    "sinks": {"sinks": SLOPES * 4},
}


@pytest.fixture(autouse=True)
def _cuda_kernels() -> None:
    if not ops.load_kernels("cuda"):
        pytest.skip(f"needs the CUDA kernels; {ops.kernel_status('cuda')}")


def on_gpu(batch: Batch) -> Batch:
    moved = {field.name: getattr(batch, field.name).cuda() for field in fields(batch) if field.name != "options"}
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in batch.options.items()}
    return Batch(**moved, options=options)


def expected(batch: Batch) -> Tensor:
    """The reference in float64; slots that nobody has written are NaN on both sides."""
    exact = replace(batch, q=batch.q.double(), k_cache=batch.k_cache.double(), v_cache=batch.v_cache.double())
    return _ragged_attention.reference(*exact.tensors, **batch.options)  # type: ignore[arg-type]


def assert_exact(result: Tensor, exact: Tensor) -> None:
    eps = 5e-6 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
    torch.testing.assert_close(result.double().cpu(), exact, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("rows", [[(1500, 8)], [(700, 5), (0, 90), (40, 0), (333, 1)]], ids=["split", "mixed"])
def test_matches_the_reference(
    rows: list[tuple[int, int]], tree: bool, options: dict[str, object], dtype: torch.dtype
) -> None:
    batch = make_batch(rows, Heads(8, 2, 64, 64), tail=3, dtype=dtype)
    batch = (with_trees(batch) if tree else batch).with_options(**options)
    gpu = on_gpu(batch)
    assert_exact(ops.ragged_attention(*gpu.tensors, **gpu.options), expected(batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_long_prompt_is_read_in_order_beside_trees(options: dict[str, object], dtype: torch.dtype) -> None:
    batch = make_batch([(700, 30), (50, 300), (0, 33), (0, 1)], Heads(8, 2, 64, 64), tail=3, dtype=dtype)
    batch = with_trees(batch, words=1).with_options(**options)
    gpu = on_gpu(batch)
    assert_exact(ops.ragged_attention(*gpu.tensors, **gpu.options), expected(batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [40, 80, 96, 128, 256])
@pytest.mark.parametrize("num_kv_heads", [1, 8])
def test_matches_the_reference_for_all_head_shapes(head_size: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    batch = make_batch([(200, 4), (7, 1)], Heads(8, num_kv_heads, head_size, head_size), dtype=dtype)
    assert_exact(ops.ragged_attention(*on_gpu(batch).tensors, **batch.options), expected(batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["chain", "tree", "blocks"])
@pytest.mark.parametrize("head_size", [64, 128, 7])
def test_packed_vectors_are_written_and_read(head_size: int, shape: str, dtype: torch.dtype) -> None:
    batch = make_batch([(700, 5), (0, 90), (333, 1)], Heads(8, 2, head_size, head_size), tail=3, dtype=dtype)
    batch = with_trees(batch) if shape == "tree" else batch
    lines = [pack_kv(cache) for cache in (batch.k_cache, batch.v_cache)]
    vectors = [unpack_kv(each, torch.float64) for each in lines]
    held = in_blocks(batch, 64) if shape == "blocks" else batch
    gpu = on_gpu(replace(held, k_cache=pack_kv(held.k_cache), v_cache=pack_kv(held.v_cache)))
    exact = expected(replace(batch, k_cache=vectors[0], v_cache=vectors[1]))
    assert_exact(ops.ragged_attention(*gpu.tensors, **gpu.options), exact)
    new, where = batch.q[:, :2].cuda(), torch.arange(batch.q.shape[0]).cuda()
    caches = [torch.zeros(1, len(where), 2, head_size + SCALE_BYTES, dtype=torch.int8).cuda() for _ in range(2)]
    ops.append_kv(*caches, new, -new, torch.zeros_like(where), where)
    assert torch.equal(caches[0][0].cpu(), pack_kv(batch.q[:, :2]))
    assert torch.equal(caches[1][0].cpu(), pack_kv(-batch.q[:, :2]))


def test_float64_is_served_by_the_reference() -> None:
    batch = make_batch([(20, 3)], dtype=torch.float64)
    result = ops.ragged_attention(*on_gpu(batch).tensors, **batch.options)
    torch.testing.assert_close(result.cpu(), expected(batch))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_append_writes_the_slots_and_nothing_else(dtype: torch.dtype) -> None:
    row_ids, slots = torch.tensor([0, 0, 2, 3, 3]), torch.tensor([3, 4, 0, 0, 0])
    caches = [torch.randn(3, 10, 2, 80).to(dtype) for _ in range(2)]
    new = [torch.randn(5, 2, 80).to(dtype) for _ in range(2)]
    gpu_caches = [cache.cuda() for cache in caches]
    ops.append_kv(*gpu_caches, *(tokens.cuda() for tokens in new), row_ids.cuda(), slots.cuda())
    for cache, tokens, written in zip(caches, new, gpu_caches, strict=True):
        cache[row_ids[:3], slots[:3]] = tokens[:3]
        assert torch.equal(written.cpu(), cache)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_move_puts_the_accepted_tokens_behind_the_committed_ones(dtype: torch.dtype) -> None:
    rows = [(5, [0, 2, 3]), (9, []), (90, range(1, 41)), (7, range(0, 80, 2))]
    moves = make_moves(rows, dtype=dtype, value_size=300)
    gpu_caches = moves.k_cache.cuda(), moves.v_cache.cuda()
    ops.move_kv(*gpu_caches, moves.starts.cuda(), moves.path.cuda(), moves.counts.cuda())
    for cache, expected_cache in zip(gpu_caches, expected_caches(moves), strict=True):
        assert same_bits(cache.cpu(), expected_cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_graph_serves_other_schedules(dtype: torch.dtype) -> None:
    """One graph, replayed for rows of other lengths, with other tokens: nothing in the launch is data."""
    heads = Heads(8, 2, 64, 64)
    schedules = [[(1000, 8), (30, 0)], [(0, 1), (900, 5)], [(500, 4), (500, 4)]]
    batches = [make_batch(rows, heads, tail=8 - sum(count for _, count in rows), dtype=dtype) for rows in schedules]
    capacity = max(batch.k_cache.shape[1] for batch in batches)

    def padded(batch: Batch) -> Batch:
        def pad(cache: Tensor) -> Tensor:
            return torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, capacity - cache.shape[1]), value=float("nan"))

        return replace(batch, k_cache=pad(batch.k_cache), v_cache=pad(batch.v_cache))

    batches = [padded(batch) for batch in batches]
    static = on_gpu(batches[0])
    ops.ragged_attention(*static.tensors, **static.options)  # compiles, and measures
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.ragged_attention(*static.tensors, **static.options)
    for batch in batches:
        for target, source in zip(static.tensors, batch.tensors, strict=True):
            target.copy_(source)
        graph.replay()
        assert_exact(result, expected(batch))


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_opcheck(tree: bool) -> None:
    batch = make_batch([(70, 3), (0, 1), (5, 0)], Heads(4, 2, 16, 8), tail=2)
    gpu = on_gpu(with_trees(batch) if tree else batch)
    torch.library.opcheck(ops.ragged_attention, gpu.tensors, gpu.options)
