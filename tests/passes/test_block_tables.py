"""`block_tables`: where slots lie in blocks."""

import pytest
import torch

from emssd_compile.passes.block_tables import locate


@pytest.mark.parametrize(("row", "slot", "block", "place"), [(0, 0, 5, 0), (0, 17, 2, 1), (2, 31, 6, 15), (3, 0, 7, 0)])
def test_slots_are_found_in_blocks(row: int, slot: int, block: int, place: int):
    table = torch.tensor([[5, 2, -1, -1], [-1] * 4, [0, 6, 1, -1]], dtype=torch.int32)
    found = locate(torch.tensor([row]), torch.tensor([slot]), table, num_blocks=7, size=16)
    assert [int(each) for each in found] == [block, place]
