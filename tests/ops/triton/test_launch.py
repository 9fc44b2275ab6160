from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.ops.triton.launch import AttentionSizes, Processors, max_tiles, plan_launch
from tests.ops.triton_process import SHARED_MEMORY

SIZES = AttentionSizes(64, 8, 4096, 32, 8, 128, 128, torch.bfloat16)
HOPPER = Processors(132, SHARED_MEMORY[90])


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=10),
    tail=st.integers(0, 40),
    group=st.integers(1, 9),
    block_queries=st.sampled_from([16, 64]),
)
def test_every_query_has_its_own_tile(counts: list[int], tail: int, group: int, block_queries: int) -> None:
    """Row b's tiles are numbered from `offsets[b] * group // block_queries + b`; the tail is the last row."""
    bound = max_tiles(sum(counts) + tail, len(counts), group, block_queries)
    begin, free = 0, 0
    for row, count in enumerate([*counts, tail]):
        first = begin * group // block_queries + row
        assert first >= free
        free = first + -(-count * group // block_queries)
        begin += count
    assert free <= bound


@pytest.mark.parametrize("shared_memory", set(SHARED_MEMORY.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [7, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_tokens", [1, 64, 8192])
def test_blocks_fit_the_tensor_cores_and_the_shared_memory(
    num_tokens: int, head_size: int, dtype: torch.dtype, shared_memory: int
) -> None:
    sizes = replace(SIZES, num_tokens=num_tokens, head_size=head_size, value_size=head_size, dtype=dtype)
    launch = plan_launch(sizes, Processors(132, shared_memory))
    for block in (launch.block_queries, launch.block_slots):
        assert block >= 16
        assert block.bit_count() == 1
    assert launch.num_stages > 1
    assert launch.shared_memory(sizes) <= shared_memory


def test_few_long_rows_are_split() -> None:
    one = plan_launch(replace(SIZES, num_tokens=8, num_rows=1, capacity=32768), HOPPER)
    assert one.num_splits * SIZES.num_kv_heads >= HOPPER.count
    assert plan_launch(replace(SIZES, num_tokens=8, num_rows=1, capacity=100), HOPPER).num_splits == 1


def test_many_rows_are_not_split() -> None:
    assert plan_launch(replace(SIZES, num_tokens=512, num_rows=64), HOPPER).num_splits == 1
    assert plan_launch(replace(SIZES, num_tokens=4096), HOPPER).num_splits == 1


def test_no_tokens() -> None:
    assert plan_launch(replace(SIZES, num_tokens=0), HOPPER).num_splits >= 1
