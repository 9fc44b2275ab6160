import pytest
import torch

import emssd_compile
from bench import shapes
from bench.memory import Memory, kv_bytes, peak_memory


@pytest.fixture(scope="module")
def fast():
    return emssd_compile.optimize(
        shapes.build("tiny-llama"), "none", max_batch=2, max_length=50, backend="eager", layout="packed"
    )


def test_the_share_by_hand():
    assert Memory(weights=60, kv=40, peak=150).over_needed == 1.5


def test_the_cache_is_counted_whole(fast):
    assert kv_bytes(fast) == 2 * 50 * (2 * 2 * 2 * 16 * 4)  # rows, tokens; layers, K and V, 2 heads of 16, float32


def test_a_pool_is_counted_as_large_as_it_is():
    model = shapes.build("tiny-llama")
    fast = emssd_compile.optimize(model, "none", max_batch=2, max_length=500, backend="eager", kv_tokens=128)
    assert kv_bytes(fast) == 128 * (2 * 2 * 2 * 16 * 4)


def test_what_the_work_holds_for_a_while_is_in_the_peak(fast):
    size = 64 * 2**20
    memory = peak_memory(fast, lambda: torch.ones(size, dtype=torch.uint8))
    assert memory
    assert memory.weights == sum(p.numel() * 4 for p in fast.model.parameters())
    growth = memory.peak - memory.weights - memory.kv
    assert 0.9 * size < growth < 1.3 * size
    calm = peak_memory(fast, lambda: None)
    assert calm
    assert calm.peak - calm.weights - calm.kv < 0.1 * size
