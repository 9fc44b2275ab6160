"""`emssd::tiled_attention`: each right-aligned query sees its row's slots up to its own."""

import math

import pytest
import torch
from torch import Tensor

from emssd_compile import ops

ROWS, HEADS, KV_HEADS, QUERIES, CAPACITY, KEY_SIZE, VALUE_SIZE = 3, 4, 2, 3, 8, 6, 5
LENGTHS = torch.tensor([7, 2, 1])  # the second row has fewer slots than there are queries: its first sees nothing


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; what no row may see is NaN."""
    q = torch.randn(ROWS, HEADS, QUERIES, KEY_SIZE).to(dtype)
    k, v = (torch.randn(ROWS, KV_HEADS, CAPACITY, size).to(dtype) for size in (KEY_SIZE, VALUE_SIZE))
    for row, length in enumerate(LENGTHS.tolist()):
        k[row, :, length:] = v[row, :, length:] = math.nan
    return q, k, v


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    softcap: float,
    *,
    is_causal: bool,
    sinks: Tensor | None = None,
) -> Tensor:
    """One row, head, query and slot at a time."""
    out = torch.zeros(ROWS, HEADS, QUERIES, VALUE_SIZE, dtype=torch.float64)
    for row, length in enumerate(LENGTHS.tolist()):
        for head in range(HEADS):
            for query in range(QUERIES):
                weights = {}
                for slot in range(min(length, length - QUERIES + query + 1) if is_causal else length):
                    score = float(q[row, head, query] @ k[row, head // 2, slot]) * 0.3
                    score = softcap * math.tanh(score / softcap) if softcap else score
                    if mask is not None:
                        place = mask.expand(-1, HEADS, -1, -1)[row, head, query, slot]
                        if mask.dtype == torch.bool and not place:
                            continue
                        score += 0.0 if mask.dtype == torch.bool else float(place)
                    weights[slot] = math.exp(score)
                total = sum(weights.values()) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
                for slot, weight in weights.items():
                    out[row, head, query] += weight / total * v[row, head // 2, slot]
    return out


MASKS = {
    "none": None,
    "bool": torch.rand(ROWS, 1, QUERIES, CAPACITY, generator=torch.Generator().manual_seed(1)) < 0.7,
    "additive": torch.randn(ROWS, HEADS, QUERIES, CAPACITY, dtype=torch.float64),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_matches_oracle(mask, softcap, is_causal):
    q, k, v = make_inputs()
    expected = oracle(q, k, v, mask, softcap, is_causal=is_causal)
    result = ops.tiled_attention(q, k, v, LENGTHS, mask, scale=0.3, softcap=softcap, is_causal=is_causal)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_sinks_match_oracle(mask, is_causal):
    q, k, v = make_inputs()
    sinks = torch.tensor([0.5, -2.0, 9.0, -torch.inf], dtype=torch.float64)
    expected = oracle(q, k, v, mask, 0.0, is_causal=is_causal, sinks=sinks)
    result = ops.tiled_attention(q, k, v, LENGTHS, mask, scale=0.3, sinks=sinks, is_causal=is_causal)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_a_hidden_key_does_not_matter():
    """NaN where each mask hides it from all queries of the first row."""
    q, k, v = make_inputs()
    visible = torch.ones(ROWS, HEADS, QUERIES, CAPACITY, dtype=torch.bool)
    visible[0, :, :, 3] = False
    for mask in (visible, visible.to(q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min / 2)):
        expected = ops.tiled_attention(q, k, v, LENGTHS, mask, scale=0.3, is_causal=False)
        broken = k.clone()
        broken[0, :, 3] = math.nan
        result = ops.tiled_attention(q, broken, v, LENGTHS, mask, scale=0.3, is_causal=False)
        assert torch.equal(result, expected)
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_in_float32(dtype):
    q, k, v = make_inputs(dtype)
    result = ops.tiled_attention(q, k, v, LENGTHS, None, scale=0.3, is_causal=True)
    assert result.dtype == dtype
    exact = ops.tiled_attention(q.double(), k.double(), v.double(), LENGTHS, None, scale=0.3, is_causal=True)
    torch.testing.assert_close(result, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_registration():
    q, k, v = (value.nan_to_num() for value in make_inputs())
    torch.library.opcheck(ops.tiled_attention, (q, k, v, LENGTHS, MASKS["bool"]), {"scale": 0.3, "is_causal": False})
