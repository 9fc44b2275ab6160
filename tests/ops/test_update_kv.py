"""`emssd::update_kv`: the packed tokens in their rows' slots, nothing else changed but scratch."""

import pytest
import torch

from emssd_compile import ops

ROWS, HEADS, CAPACITY, SIZE = 3, 2, 9, 4


@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_the_slots_and_nothing_else(dtype, tail):
    cache = torch.randn(ROWS, HEADS, CAPACITY, SIZE).to(dtype)
    given = cache.clone()
    row_ids, slots = torch.tensor([0, 0, 2] + [ROWS] * tail), torch.tensor([3, 4, 7] + [0] * tail)
    offsets, lengths = torch.tensor([0, 2, 2, 3]), torch.tensor([3, 5, 7])
    new = torch.randn(3 + tail, HEADS, SIZE).to(dtype)
    result = ops.update_kv(cache, new, row_ids, slots, offsets, lengths)

    expected = given.clone()
    for token, (row, slot) in enumerate([(0, 3), (0, 4), (2, 7)]):
        expected[row, :, slot] = new[token]
    assert torch.equal(result[:, :, :-1], expected[:, :, :-1])
    assert torch.equal(cache, given), "the cache that went in is as it was"


def test_registration():
    cache, new = torch.randn(ROWS, HEADS, CAPACITY, SIZE), torch.randn(2, HEADS, SIZE)
    places = torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 1])
    torch.library.opcheck(ops.update_kv, (cache, new, *places))
