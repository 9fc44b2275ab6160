"""`uniforms`: numbers that look random in every direction, and depend on nothing but what they are asked for."""

import math

import pytest
import torch

from emssd_compile.step.randomness import uniforms

COUNT = 40_000
SEEDS, POSITIONS = torch.full((COUNT,), 7), torch.arange(COUNT)
DIRECTIONS = {
    "position": (SEEDS, POSITIONS),
    "seed": (POSITIONS, SEEDS),
    "large seed": (POSITIONS * 2**40, SEEDS),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_numbers_are_uniform_and_neighbours_independent(direction):
    numbers = uniforms(*DIRECTIONS[direction]).double()
    assert numbers.min() > 0
    assert numbers.max() < 1
    cells = (numbers[:-1] * 8).long() * 8 + (numbers[1:] * 8).long()
    counts = torch.bincount(cells, minlength=64)
    expected = (COUNT - 1) / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 5 / math.sqrt(COUNT)


def test_streams_are_independent():
    numbers = torch.stack([uniforms(SEEDS, POSITIONS, stream) for stream in range(4)])
    correlation = torch.corrcoef(numbers) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(COUNT)


def test_a_number_depends_on_its_own_seed_and_position_only():
    alone = uniforms(torch.tensor([3]), torch.tensor([11]), 2)
    batch = uniforms(torch.tensor([9, 3, 3]), torch.tensor([11, 11, 12]), 2)
    assert alone == batch[1]
    assert len(set(batch.tolist())) == 3
