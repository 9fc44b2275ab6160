"""Packed keys and values in the Triton kernels: written as the reference packs them, read as what they stand for."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from emssd_compile.ops._packed_kv import SCALE_BYTES, pack_kv, unpack_kv
from tests.ops.ragged import Batch, Heads, in_blocks, make_batch, oracle, with_trees
from tests.ops.triton.test_ragged_attention import OPTIONS, ROWS, SMALL, assert_exact
from tests.ops.triton_process import TritonProcess, needs_triton

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = Heads(4, 2, 32, 32)


@pytest.fixture(scope="module")
def triton() -> Iterator[TritonProcess]:
    process = TritonProcess()
    yield process
    process.close()


def packed(batch: Batch) -> tuple[Batch, Batch]:
    """The batch with packed caches, and with the vectors that those are."""
    lines = pack_kv(batch.k_cache), pack_kv(batch.v_cache)
    vectors = [unpack_kv(each, torch.float64) for each in lines]
    return replace(batch, k_cache=lines[0], v_cache=lines[1]), replace(batch, k_cache=vectors[0], v_cache=vectors[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_tokens_are_packed_where_they_are_written(triton: TritonProcess, dtype: torch.dtype) -> None:
    rows, capacity, heads, sizes = 3, 10, 2, (20, 7)
    caches = [torch.full((rows, capacity, heads, n + SCALE_BYTES), 99, dtype=torch.int8) for n in sizes]
    row_ids, slots = torch.tensor([0, 0, 2, 1, rows, 0]), torch.tensor([3, 4, 0, 9, 0, capacity])
    fused = (torch.randn(6, heads, sum(sizes)) * torch.logspace(-3, 3, 6)[:, None, None]).to(dtype)
    keys, values = fused.split(sizes, -1)  # slices of one projection
    keys[0, 0], values[1, 1] = 0, torch.arange(7).to(dtype) * 0.5 * 127 / 3  # halves between two integers
    written = triton.append(caches[0], caches[1], keys, values, row_ids, slots)
    for cache, new, found in zip(caches, (keys, values), written, strict=True):
        cache[row_ids[:4], slots[:4]] = pack_kv(new[:4])
        assert torch.equal(found, cache)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_is_read_as_no_number(triton: TritonProcess, value: float) -> None:
    cache = torch.zeros(1, 4, 2, 8 + SCALE_BYTES, dtype=torch.int8)
    new = torch.randn(2, 2, 8)
    new[1, 0, 3] = value
    for written in triton.append(cache, cache.clone(), new, new, torch.tensor([0, 0]), torch.tensor([0, 1])):
        found = unpack_kv(written[0, :2], torch.float32)
        assert found[1, 0].isnan().all()
        assert torch.equal(found[0], unpack_kv(pack_kv(new[0]), torch.float32))
        assert found[1, 1].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("heads", [HALF, Heads(4, 4, 7, 5)], ids=str)  # at multiples of 4 bytes, and not
@pytest.mark.parametrize("options", ["plain", "window across blocks", "all"])
@pytest.mark.parametrize("shape", ["chain", "tree", "blocks"])
def test_attention_reads_the_vectors(
    triton: TritonProcess, shape: str, options: str, heads: Heads, splits: int
) -> None:
    batch = make_batch(ROWS, heads, tail=1).with_options(**OPTIONS[options])
    batch = with_trees(batch) if shape == "tree" else batch
    held = in_blocks(batch, 16) if shape == "blocks" else batch
    assert_exact(triton.attend(packed(held)[0], **SMALL, num_splits=splits), oracle(packed(batch)[1]))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_small_values_are_kept_in_half_precision(triton: TritonProcess, dtype: torch.dtype) -> None:
    """A weight times a scale of 1e-5 is too little for float16; the vector's own components are not."""
    batch = make_batch(ROWS, HALF, tail=1, dtype=dtype)
    lines, vectors = packed(replace(batch, v_cache=batch.v_cache * 1e-3))
    result, expected = triton.attend(lines, **SMALL), oracle(vectors)
    assert result.dtype == dtype
    assert float((result.double() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(expected.abs().max())


def test_a_later_token_cannot_reach_an_earlier_one(triton: TritonProcess) -> None:
    batch = make_batch([(20, 4)], Heads(2, 1, 16, 16))
    expected = triton.attend(packed(batch)[0], **SMALL)
    batch.k_cache[0, 22:24] = float("nan")
    batch.v_cache[0, 22:24] = float("inf")
    result = triton.attend(packed(batch)[0], **SMALL)
    assert torch.equal(result[:2], expected[:2])
    assert result[2:].isnan().all()


def test_refuses_what_does_not_fit(triton: TritonProcess) -> None:
    batch = make_batch([(8, 2)], HALF)
    lines = packed(batch)[0]
    with pytest.raises(RuntimeError, match="or caches of packed vectors, do not fit"):
        triton.attend(replace(lines, v_cache=batch.v_cache))
    scattered = lines.v_cache.transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(RuntimeError, match="or caches of packed vectors, do not fit"):
        triton.attend(replace(lines, v_cache=scattered))
    new, where = torch.randn(1, 2, 32), torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"v_cache .* do not fit"):
        triton.append(lines.k_cache, scattered, new, new, where, where)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu_into_no_more_memory(capability: int) -> None:
    compiler = TritonProcess(capability)
    plain = make_batch([(700, 8)], Heads(8, 2, 128, 128), dtype=torch.bfloat16)
    batch, where = packed(plain)[0], torch.zeros(2, 8, dtype=torch.long)
    shared = []
    for each in (plain, batch, packed(in_blocks(plain, 64))[0]):
        compiler.attend(each)
        (attend, _, used), (merge, *_) = compiler.launched()
        assert (attend, merge) == ("attend", "merge_splits")
        shared.append(used)
    assert max(shared) == shared[0]
    compiler.append(batch.k_cache, batch.v_cache, plain.q[:, :2], plain.q[:, :2], *where)
    assert [(kernel, grid) for kernel, grid, _ in compiler.launched()] == [("_append", (8, 2))]
    compiler.close()
