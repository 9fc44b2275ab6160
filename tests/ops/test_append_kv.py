import pytest
import torch
from torch import Tensor

from emssd_compile import ops

NUM_ROWS, CAPACITY, NUM_KV_HEADS, KEY_SIZE, VALUE_SIZE = 3, 10, 2, 4, 6
ROW_IDS = torch.tensor([0, 0, 2, NUM_ROWS, NUM_ROWS])
SLOTS = torch.tensor([3, 4, 0, 0, 0])


def make_caches(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    shape = (NUM_ROWS, CAPACITY, NUM_KV_HEADS)
    return torch.randn(*shape, KEY_SIZE).to(dtype), torch.randn(*shape, VALUE_SIZE).to(dtype)


def make_tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, NUM_KV_HEADS, KEY_SIZE).to(dtype), torch.randn(count, NUM_KV_HEADS, VALUE_SIZE).to(dtype)


def expected_cache(cache: Tensor, new: Tensor, row_ids: Tensor, slots: Tensor) -> Tensor:
    cache = cache.clone()
    for token, (row, slot) in enumerate(zip(row_ids.tolist(), slots.tolist(), strict=True)):
        if row < NUM_ROWS:
            cache[row, slot] = new[token]
    return cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("row_ids", "slots"),
    [
        (ROW_IDS, SLOTS),
        (torch.tensor([1]), torch.tensor([9])),
        (torch.tensor([NUM_ROWS]), torch.tensor([0])),
        (torch.tensor([NUM_ROWS, 0, NUM_ROWS]), torch.tensor([0, 0, 0])),
        (torch.tensor([NUM_ROWS, NUM_ROWS]), torch.tensor([77, -1])),
        (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
    ],
    ids=["ragged", "one", "inert only", "inert first", "inert slots are ignored", "no tokens"],
)
def test_writes_the_slots_and_nothing_else(kernels: str, row_ids: Tensor, slots: Tensor, dtype: torch.dtype) -> None:
    k_cache, v_cache = make_caches(dtype)
    k, v = make_tokens(len(row_ids), dtype)
    expected_k, expected_v = expected_cache(k_cache, k, row_ids, slots), expected_cache(v_cache, v, row_ids, slots)
    ops.append_kv(k_cache, v_cache, k, v, row_ids, slots)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def test_any_strides(kernels: str) -> None:
    k_cache, v_cache = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in make_caches())
    k, v = make_tokens(len(ROW_IDS))
    fused_k = torch.cat([v, k], dim=2)[:, :, VALUE_SIZE:]  # a slice of a fused projection
    scattered_v = v.transpose(0, 2).contiguous().transpose(0, 2)
    expected_k, expected_v = expected_cache(k_cache, k, ROW_IDS, SLOTS), expected_cache(v_cache, v, ROW_IDS, SLOTS)
    ops.append_kv(k_cache, v_cache, fused_k, scattered_v, ROW_IDS, SLOTS)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def test_many_tokens_on_several_threads(cpu_kernels: None) -> None:
    k_cache, v_cache = torch.zeros(1, 4096, 4, 32), torch.zeros(1, 4096, 4, 32)
    k, v = torch.randn(4096, 4, 32), torch.randn(4096, 4, 32)
    slots = torch.randperm(4096)
    ops.append_kv(k_cache, v_cache, k, v, torch.zeros(4096, dtype=torch.int64), slots)
    assert torch.equal(k_cache[0, slots], k)
    assert torch.equal(v_cache[0, slots], v)


@pytest.mark.parametrize(
    ("row_id", "slot", "message"),
    [
        (NUM_ROWS + 1, 0, "token 0 goes to row 4, slot 0"),
        (-1, 0, "token 0 goes to row -1"),
        (0, CAPACITY, "the cache has 3 rows of 10 slots"),
        (0, -1, "slot -1"),
    ],
)
def test_cpp_form_refuses_what_would_reach_outside(cpu_kernels: None, row_id: int, slot: int, message: str) -> None:
    k_cache, v_cache = make_caches()
    before = k_cache.clone()
    with pytest.raises(RuntimeError, match=message):
        ops.append_kv(k_cache, v_cache, *make_tokens(1), torch.tensor([row_id]), torch.tensor([slot]))
    assert torch.equal(k_cache, before)


def test_cpp_form_refuses_another_dtype(cpu_kernels: None) -> None:
    with pytest.raises(RuntimeError, match="k_cache holds Float, k is Half"):
        ops.append_kv(*make_caches(), *make_tokens(5, torch.float16), ROW_IDS, SLOTS)


def test_cpp_form_refuses_another_shape(cpu_kernels: None) -> None:
    k, v = make_tokens(5)
    with pytest.raises(RuntimeError, match="does not fit 5 tokens of v_cache"):
        ops.append_kv(*make_caches(), k, v[:, :, :-1], ROW_IDS, SLOTS)


def test_opcheck(kernels: str) -> None:
    torch.library.opcheck(ops.append_kv, (*make_caches(), *make_tokens(5), ROW_IDS, SLOTS))


def test_compiled_step_writes_the_caches_in_place(cpu_kernels: None) -> None:
    """One compilation for every number of tokens; the caches are the caller's own, not copies."""

    def step(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, row_ids: Tensor, offsets: Tensor
    ) -> Tensor:
        lengths = torch.tensor([2, 0, 1])
        begin = torch.cat([offsets[:-1], offsets[-1:]])[row_ids]
        slots = torch.cat([lengths, torch.zeros(1, dtype=torch.int64)])[row_ids] + torch.arange(len(q)) - begin
        torch.ops.emssd.append_kv(k_cache, v_cache, k * 2, v + 1, row_ids, slots)
        return torch.ops.emssd.ragged_attention(q + 1, k_cache, v_cache, offsets, lengths, slots, scale=0.5) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for counts, tail in (((2, 1, 2), 2), ((3, 0, 1), 1), ((4, 4, 4), 5)):
        num_tokens = sum(counts) + tail
        row_ids = torch.repeat_interleave(torch.arange(NUM_ROWS + 1), torch.tensor([*counts, tail]))
        offsets = torch.tensor([0, *counts]).cumsum(0)
        q, (k, v) = torch.randn(num_tokens, 4, KEY_SIZE), make_tokens(num_tokens)
        eager_caches, caches = make_caches(), make_caches()
        for cache, eager_cache in zip(caches, eager_caches, strict=True):
            cache.copy_(eager_cache)
        pointers = [cache.data_ptr() for cache in caches]
        with torch.compiler.set_stance("fail_on_recompile" if num_tokens != 7 else "default"):
            result = compiled(q, *caches, k, v, row_ids, offsets)
        assert torch.equal(result, step(q, *eager_caches, k, v, row_ids, offsets))
        assert torch.equal(caches[0], eager_caches[0])
        assert torch.equal(caches[1], eager_caches[1])
        assert pointers == [cache.data_ptr() for cache in caches]
