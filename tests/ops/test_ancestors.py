"""Ancestor masks in bits: what each bit means, and that the masks come back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile import ops
from emssd_compile.ops._ancestors import unpack_ancestors


def _mask(num_tokens: int, width: int, seed: int) -> Tensor:
    return torch.rand(num_tokens, width, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(num_tokens=st.integers(0, 4), width=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
def test_words_hold_the_mask_and_nothing_else(num_tokens, width, seed):
    mask = _mask(num_tokens, width, seed)
    words = ops.pack_ancestors(mask)
    assert words.dtype == torch.int32
    assert words.shape == (num_tokens, -(-width // 32))
    for token, row in enumerate(words.tolist()):
        number = sum((word % 2**32) << 32 * place for place, word in enumerate(row))
        assert number == sum(1 << j for j in range(width) if mask[token, j])
    assert torch.equal(unpack_ancestors(words)[:, :width], mask)
    assert not unpack_ancestors(words)[:, width:].any()


def test_the_example_of_the_docstring():
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    assert ops.pack_ancestors(tree).tolist() == [[0b001], [0b011], [0b101]]
    assert ops.pack_ancestors(torch.ones(1, 32, dtype=torch.bool)).tolist() == [[-1]], "bit 31 is the sign"


@pytest.mark.parametrize("width", [33, 64])
def test_it_is_traced_into_a_graph_for_any_number_of_tokens(width):
    class Pack(torch.nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return ops.pack_ancestors(mask)

    tokens = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Pack(), (_mask(5, width, 0),), dynamic_shapes=(tokens,), strict=True)
    other = _mask(9, width, 1)
    assert torch.equal(program.module()(other), ops.pack_ancestors(other))
