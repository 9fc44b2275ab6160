"""`uniforms`: numbers that look random in every direction, and depend on nothing but what they are asked for."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.step.randomness import uniforms

COUNT = 40_000
SEVEN, COUNTER = torch.full((COUNT,), 7), torch.arange(COUNT)
DIRECTIONS = {
    "position": (SEVEN, COUNTER, 0, SEVEN),
    "seed": (COUNTER, SEVEN, 0, SEVEN),
    "upper half of the seed": (COUNTER << 32, SEVEN, 0, SEVEN),
    "sign of the seed": (COUNTER - COUNT // 2, SEVEN, 0, SEVEN),
    "index": (SEVEN, SEVEN, 0, COUNTER),
    "position and index together": (SEVEN, COUNTER, 0, COUNTER),
    "index against position": (SEVEN, COUNTER, 0, COUNT - COUNTER),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_numbers_are_uniform_and_neighbours_independent(direction):
    numbers = uniforms(*DIRECTIONS[direction]).double()
    assert numbers.min() > 0
    assert numbers.max() < 1
    for lag in (1, 2, 16, 256):
        cells = (numbers[:-lag] * 8).long() * 8 + (numbers[lag:] * 8).long()
        counts = torch.bincount(cells, minlength=64)
        expected = (COUNT - lag) / 64
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 63 + 5 * math.sqrt(2 * 63)
        assert abs(torch.corrcoef(torch.stack([numbers[:-lag], numbers[lag:]]))[0, 1]) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_bit_is_fair_and_changes_half_of_the_time(direction):
    bits = (uniforms(*DIRECTIONS[direction]).double() * 2**20).long()[:, None] >> torch.arange(20) & 1
    bound = 5 * 0.5 / math.sqrt(COUNT)
    assert ((bits.double().mean(0) - 0.5).abs() < bound).all()
    assert (((bits[1:] ^ bits[:-1]).double().mean(0) - 0.5).abs() < bound).all()


def test_streams_positions_and_seeds_draw_independent_vocabularies():
    """Rows of numbers over a vocabulary, as sampling takes them: no two correlate."""
    ids = torch.arange(20_000)
    asked = [(7, 0, 0), (7, 1, 0), (7, 2, 0), (8, 0, 0), (8, 1, 0), (7 + 2**32, 0, 0), (-7, 0, 0), (7, 0, 1), (7, 0, 2)]
    rows = torch.stack([uniforms(torch.tensor(s), torch.tensor(p), n, ids) for s, p, n in asked])
    correlation = torch.corrcoef(rows.double()) - torch.eye(len(asked))
    assert correlation.abs().max() < 5 / math.sqrt(len(ids))


def test_the_largest_of_a_vocabulary_is_as_often_any_id():
    """The Gumbel-max trick with equal probabilities: which id wins is uniform, also for neighbouring positions."""
    ids, draws = torch.arange(50), 20_000
    winners = uniforms(torch.tensor(3), torch.arange(draws)[:, None], 0, ids).argmin(1)  # [draws]
    counts = torch.bincount(winners, minlength=50)
    assert ((counts - draws / 50) ** 2 / (draws / 50)).sum() < 49 + 5 * math.sqrt(2 * 49)
    pairs = torch.bincount(winners[:-1] % 5 * 5 + winners[1:] % 5, minlength=25)
    assert ((pairs - draws / 25) ** 2 / (draws / 25)).sum() < 24 + 5 * math.sqrt(2 * 24)


def test_small_numbers_are_fine_grained():
    """-log(1 - u), an exponential, is exact to its smallest values: those win when a token is drawn by them."""
    numbers = uniforms(torch.tensor(1), torch.arange(2000)[:, None], 0, torch.arange(2000)).flatten().double()
    smallest = numbers.sort().values[:1000]  # the k-th of 4 million is about k / 4e6
    expected = torch.arange(1, 1001) / numbers.numel()
    assert abs(float(smallest[-1] / expected[-1]) - 1) < 5 / math.sqrt(1000)
    assert smallest.unique().numel() > 990


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**31 - 1),
    stream=st.integers(0, 2**31 - 1),
    index=st.integers(0, 2**31 - 1),
)
def test_the_arithmetic_is_that_of_32_bit_words(seed, position, stream, index):
    """Against machine words that wrap: nothing overflows in int64 on the way."""

    def mixed(word):
        word = (word ^ word >> np.uint32(16)) * np.uint32(0x21F0AAAD)
        word = (word ^ word >> np.uint32(15)) * np.uint32(0x735A2D97)
        return word ^ word >> np.uint32(15)

    with np.errstate(over="ignore"):
        golden = np.uint32(0x1E3779B1)
        key = mixed(np.uint32(seed & 0xFFFFFFFF) ^ golden)
        key = mixed(key ^ np.uint32(seed >> 32 & 0xFFFFFFFF))
        key = mixed(key + np.uint32(position) * golden)
        first = mixed(key + np.uint32(stream) * golden)
        word = mixed(mixed(first + np.uint32(index) * golden) + mixed(first ^ golden))
    expected = min((np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2**-24))
    found = uniforms(torch.tensor(seed), torch.tensor(position), stream, torch.tensor(index))
    assert found.item() == expected
    assert found.dtype == torch.float32


def test_a_number_depends_on_its_own_seed_and_position_only():
    alone = uniforms(torch.tensor([3]), torch.tensor([11]), 2)
    batch = uniforms(torch.tensor([9, 3, 3]), torch.tensor([11, 11, 12]), 2)
    assert alone == batch[1]
    assert len(set(batch.tolist())) == 3


class _Numbers(torch.nn.Module):
    def forward(self, seeds, positions, index):
        return uniforms(seeds[:, None], positions[:, None], 3, index)


@pytest.fixture(scope="module")
def asked():
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (6,), generator=generator)
    return seeds, torch.randint(0, 2**31 - 1, (6,), generator=generator), torch.arange(1003)


def test_inductor_gives_the_same_bits(asked):
    assert torch.equal(torch.compile(_Numbers())(*asked), _Numbers()(*asked))


def test_onnx_gives_the_same_bits(asked):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(_Numbers(), asked, dynamo=True, opset_version=24, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    given = {node.name: value.numpy() for node, value in zip(session.get_inputs(), asked, strict=True)}
    assert torch.equal(torch.from_numpy(session.run(None, given)[0]), _Numbers()(*asked))


def test_without_an_index_it_is_the_first():
    seeds, positions = torch.tensor([[3], [4]]), torch.tensor([11, 12])
    assert torch.equal(uniforms(seeds, positions, 5), uniforms(seeds, positions, 5, torch.tensor(0)))
