from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.triton_process import TritonProcess, needs_triton

pytestmark = needs_triton

NUM_ROWS, CAPACITY, NUM_KV_HEADS, KEY_SIZE, VALUE_SIZE = 3, 10, 2, 4, 6
ROW_IDS = torch.tensor([0, 0, 2, NUM_ROWS, NUM_ROWS])
SLOTS = torch.tensor([3, 4, 0, 0, 0])


@pytest.fixture(scope="module")
def triton() -> Iterator[TritonProcess]:
    process = TritonProcess()
    yield process
    process.close()


def make_caches(dtype: torch.dtype = torch.float32, value_size: int = VALUE_SIZE) -> tuple[Tensor, Tensor]:
    shape = (NUM_ROWS, CAPACITY, NUM_KV_HEADS)
    return torch.randn(*shape, KEY_SIZE).to(dtype), torch.randn(*shape, value_size).to(dtype)


def make_tokens(count: int, dtype: torch.dtype = torch.float32, value_size: int = VALUE_SIZE) -> tuple[Tensor, Tensor]:
    shape = (count, NUM_KV_HEADS)
    return torch.randn(*shape, KEY_SIZE).to(dtype), torch.randn(*shape, value_size).to(dtype)


def expected_cache(cache: Tensor, new: Tensor, row_ids: Tensor, slots: Tensor) -> Tensor:
    cache = cache.clone()
    for token, (row, slot) in enumerate(zip(row_ids.tolist(), slots.tolist(), strict=True)):
        if 0 <= row < NUM_ROWS and 0 <= slot < CAPACITY:
            cache[row, slot] = new[token]
    return cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("row_ids", "slots"),
    [
        (ROW_IDS, SLOTS),
        (torch.tensor([1]), torch.tensor([9])),
        (torch.tensor([NUM_ROWS, 0, NUM_ROWS]), torch.tensor([0, 0, 0])),
        (torch.tensor([NUM_ROWS, NUM_ROWS]), torch.tensor([77, -1])),
        (torch.tensor([0, 1, -1]), torch.tensor([CAPACITY, -1, 0])),
        (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
    ],
    ids=["ragged", "one", "inert first", "only inert", "outside the cache", "no tokens"],
)
def test_writes_the_slots_and_nothing_else(
    triton: TritonProcess, row_ids: Tensor, slots: Tensor, dtype: torch.dtype
) -> None:
    k_cache, v_cache = make_caches(dtype)
    k, v = make_tokens(len(row_ids), dtype)
    written = triton.append(k_cache, v_cache, k, v, row_ids, slots)
    assert torch.equal(written[0], expected_cache(k_cache, k, row_ids, slots))
    assert torch.equal(written[1], expected_cache(v_cache, v, row_ids, slots))


def test_tokens_of_several_blocks(triton: TritonProcess) -> None:
    (k_cache, v_cache), (k, v) = make_caches(value_size=700), make_tokens(5, value_size=700)
    written = triton.append(k_cache, v_cache, k, v, ROW_IDS, SLOTS)
    assert torch.equal(written[0], expected_cache(k_cache, k, ROW_IDS, SLOTS))
    assert torch.equal(written[1], expected_cache(v_cache, v, ROW_IDS, SLOTS))


def test_any_strides(triton: TritonProcess) -> None:
    k_cache, v_cache = (cache.transpose(1, 3).contiguous().transpose(1, 3) for cache in make_caches())
    k, v = make_tokens(len(ROW_IDS))
    fused_k = torch.cat([v, k], dim=2)[:, :, VALUE_SIZE:]  # a slice of a fused projection
    scattered_v = v.transpose(0, 2).contiguous().transpose(0, 2)
    every_second = torch.stack([ROW_IDS, SLOTS], dim=1)
    written = triton.append(k_cache, v_cache, fused_k, scattered_v, every_second[:, 0], every_second[:, 1])
    assert torch.equal(written[0], expected_cache(k_cache, k, ROW_IDS, SLOTS))
    assert torch.equal(written[1], expected_cache(v_cache, v, ROW_IDS, SLOTS))


def test_refuses_another_dtype_and_shape(triton: TritonProcess) -> None:
    k, v = make_tokens(5)
    with pytest.raises(RuntimeError, match=r"k_cache \[B, C, Hkv, D\].* do not fit: torch.float32 .* torch.float16"):
        triton.append(*make_caches(), k.half(), v, ROW_IDS, SLOTS)
    with pytest.raises(RuntimeError, match=r"v_cache .* do not fit"):
        triton.append(*make_caches(), k, v[:, :, :-1], ROW_IDS, SLOTS)


def test_compiles_for_a_gpu() -> None:
    compiler = TritonProcess(capability=90)
    compiler.append(*make_caches(torch.bfloat16), *make_tokens(5, torch.bfloat16), ROW_IDS, SLOTS)
    assert [(kernel, grid) for kernel, grid, _ in compiler.launched()] == [("_append", (5, 1))]
    compiler.close()
