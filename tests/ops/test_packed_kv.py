"""Packed keys and values: how far they are off, and that the ops read and write them as any others."""

from __future__ import annotations

import pytest
import torch

from emssd_compile import ops
from emssd_compile.ops._packed_kv import SCALE_BYTES, pack_kv, unpack_kv, vector_size
from tests.ops.ragged import Heads, in_blocks, make_batch, with_trees
from tests.ops.test_ragged_attention import OPTIONS, ROWS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_component_is_off_by_a_254th_of_the_largest_at_most(dtype):
    vectors = (torch.randn(50, 3, 21) * torch.logspace(-3, 3, 50)[:, None, None]).to(dtype)
    vectors[7] = 0
    packed = pack_kv(vectors)
    assert packed.dtype == torch.int8
    assert packed.shape == (50, 3, 21 + SCALE_BYTES)
    assert vector_size(packed) == vector_size(vectors) == 21
    found = unpack_kv(packed, torch.float64)
    largest = vectors.double().abs().amax(-1, keepdim=True)
    assert ((found - vectors.double()).abs() <= largest * (1 / 254 + 1e-6)).all()
    assert not found[7].any()
    assert torch.equal(packed[3:4], pack_kv(vectors[3:4]))  # whatever else is packed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_is_read_as_no_number_and_no_other_is(value):
    vectors = torch.randn(3, 8)
    vectors[1, 5] = value
    found = unpack_kv(pack_kv(vectors), torch.float32)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_packed_where_they_are_written(kernels, dtype):
    rows, capacity, heads, key_size, value_size = 3, 10, 2, 20, 6
    caches = [torch.zeros(rows, capacity, heads, n + SCALE_BYTES, dtype=torch.int8) for n in (key_size, value_size)]
    row_ids, slots = torch.tensor([0, 0, 2, rows]), torch.tensor([3, 4, 0, 0])
    fused = torch.randn(4, heads, key_size + value_size).to(dtype)  # slices of one projection
    fused[2, 1, 0] = float("inf")
    keys, values = fused.split((key_size, value_size), -1)
    ops.append_kv(*caches, keys, values, row_ids, slots)
    for cache, new in zip(caches, (keys, values), strict=True):
        written = unpack_kv(cache[row_ids[:3], slots[:3]], dtype)
        assert torch.equal(written.nan_to_num(7), unpack_kv(pack_kv(new[:3]), dtype).nan_to_num(7))
        assert torch.count_nonzero(cache.view(rows * capacity, -1).any(-1)) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("heads", [Heads(4, 2, 32, 32), Heads(4, 4, 7, 5)], ids=str)
@pytest.mark.parametrize("shape", ["chain", "tree", "blocks"])
def test_attention_reads_what_the_unpacked_vectors_are(kernels, heads, options, shape, dtype):
    batch = make_batch(ROWS, heads, tail=2, dtype=dtype).with_options(**OPTIONS[options])
    batch = with_trees(batch) if shape == "tree" else in_blocks(batch, 16) if shape == "blocks" else batch
    packed = [pack_kv(cache) for cache in batch.tensors[1:3]]
    plain = [unpack_kv(cache, torch.float64 if dtype == torch.float64 else torch.float32) for cache in packed]
    q = batch.tensors[0]
    exact = q.to(plain[0].dtype)
    expected = ops.ragged_attention(exact, *plain, *batch.tensors[3:], **batch.options)
    found = ops.ragged_attention(q, *packed, *batch.tensors[3:], **batch.options)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))
    assert expected.any()
