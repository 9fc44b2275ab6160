"""`LastRead`: what a row has read last is there when more of its text is read, and nothing of what another read."""

from dataclasses import replace

import torch

from emssd_compile.drafters.last_read import LastRead
from emssd_compile.step.pack import pack
from tests.drafters.contexts import context

COUNT, WIDTH, CAPACITY = 3, 2, 24
ENDS = [(1, 9), (1, 14), (2, 15), (7, 19), (8, 19)]
"""How far two rows have come after each step; one begins at 0, the other behind 9 tokens that another row has read."""


def _feature(row: int, position: int) -> list[float]:
    return [float(row), float(position)]


def test_each_row_reads_again_what_it_read_last_itself():
    last = LastRead(COUNT)
    specs = last.tensors(2, WIDTH, torch.float32)
    state = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    seen = context([[1], [1]], limit=4, capacity=CAPACITY)
    before, places = (0, 9), torch.arange(32)
    for ends in ENDS:
        starts, upto = torch.tensor(before), torch.tensor(ends)
        read = pack(seen.history, upto, starts, upto > starts, places, places, share=32)
        found = replace(seen, read=read, state=state)
        window = last.window(found)
        for row, begun in enumerate((0, 9)):
            if ends[row] == before[row]:
                continue
            first = max(before[row] - COUNT, begun)
            assert window.positions[row].tolist() == list(range(first, first + COUNT))
            for place in range(before[row] - first):
                assert window.features[row, place].tolist() == _feature(row, first + place)
        packed = zip(read.row_ids.tolist(), read.positions.tolist(), strict=True)
        state = last.after(found, window, torch.tensor([_feature(*each) for each in packed]))
        before = ends
