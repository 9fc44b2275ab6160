import math

import pytest
import torch
from torch import Tensor

from emssd_compile import ops

NUM_HEADS, NUM_KV_HEADS, NUM_TOKENS, KEY_SIZE, VALUE_SIZE = 4, 2, 9, 8, 6
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
SINKS = torch.tensor([0.5, -2.0, 9.0, -torch.inf], dtype=torch.float64)

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": SLOPES},
    "chunk": {"chunk": 4},
    "chunk of one": {"chunk": 1},
    "sinks": {"sinks": SINKS},
    "all": {"window": 4, "chunk": 6, "softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS},
}


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(1, NUM_HEADS, NUM_TOKENS, KEY_SIZE).to(dtype),
        torch.randn(1, NUM_KV_HEADS, NUM_TOKENS, KEY_SIZE).to(dtype),
        torch.randn(1, NUM_KV_HEADS, NUM_TOKENS, VALUE_SIZE).to(dtype),
    )


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    chunk: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One head, one token and one key at a time."""
    out = torch.zeros(1, NUM_HEADS, NUM_TOKENS, VALUE_SIZE, dtype=torch.float64)
    for head in range(NUM_HEADS):
        kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
        for i in range(NUM_TOKENS):
            weights = {}
            first = max(i - window + 1 if window else 0, i // chunk * chunk if chunk else 0)
            for j in range(max(0, first), i + 1):
                score = float(q[0, head, i].double() @ k[0, kv_head, j].double()) * scale
                score = softcap * math.tanh(score / softcap) if softcap else score
                score += float(alibi_slopes[head]) * (j - i) if alibi_slopes is not None else 0.0
                weights[j] = math.exp(score)
            total = sum(weights.values()) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
            for j, weight in weights.items():
                out[0, head, i] += weight / total * v[0, kv_head, j].double()
    return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_oracle(options: dict[str, object]) -> None:
    inputs = make_inputs()
    expected = oracle(*inputs, scale=0.3, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(ops.attention(*inputs, scale=0.3, **options), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softmax_and_sums_are_float32(dtype: torch.dtype) -> None:
    """Only the result is rounded to the dtype."""
    inputs = make_inputs(dtype)
    result = ops.attention(*inputs, scale=0.3)
    assert result.dtype == dtype
    eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), oracle(*inputs, scale=0.3), rtol=0.51 * eps, atol=1e-6)


def test_equals_scaled_dot_product_attention() -> None:
    q, k, v = make_inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.3), expected, rtol=0, atol=1e-13)


def test_heads_of_a_token_are_contiguous() -> None:
    inputs = make_inputs()
    result = ops.attention(*inputs, scale=0.3)
    assert result.shape == (1, NUM_HEADS, NUM_TOKENS, VALUE_SIZE)
    assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(options: dict[str, object], dtype: torch.dtype) -> None:
    torch.library.opcheck(ops.attention, make_inputs(dtype), {"scale": 0.3, **options})


def test_one_token() -> None:
    q, k, v = (x[:, :, :1] for x in make_inputs())
    expected = v.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.3), expected, rtol=0, atol=0)
