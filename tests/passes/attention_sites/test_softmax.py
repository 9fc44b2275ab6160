"""Attention that is spelled out around a softmax is the op; what is no attention is refused at the node it fails on."""

import math

import pytest
import torch
from torch import Tensor

from tests.passes.attention_sites.forms import assert_raised, attributes, causal_scores, refusal
from tests.passes.graphs import HEADS, TinyModel


def _products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def _capped(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_scores(3.0 * torch.tanh(_products(q, k) * 0.25 / 3.0)).softmax(-1) @ v


def _window(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = torch.arange(q.shape[2])
    hidden = (tokens > tokens[:, None]) | (tokens <= tokens[:, None] - 5)
    return _products(q, k).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _precise(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_scores(_products(q, k) / math.sqrt(4)).softmax(-1, dtype=torch.float64).to(v.dtype) @ v


SPELLINGS = {
    "no scale": (lambda m, q, k, v: causal_scores(_products(q, k)).softmax(-1) @ v, {"scale": 1.0}),
    "a scale": (lambda m, q, k, v: causal_scores(_products(q, k) * 0.3).softmax(-1) @ v, {"scale": 0.3}),
    "a softmax in float64": (_precise, {"scale": 0.5}),
    "a softcap": (_capped, {"scale": 0.25, "softcap": 3.0}),
    "a window": (_window, {"scale": 1.0, "window": 5}),
}


@pytest.mark.parametrize(("attend", "expected"), SPELLINGS.values(), ids=SPELLINGS)
def test_what_stands_between_the_products_becomes_attributes(attend, expected):
    assert attributes(attend) == pytest.approx(expected)


def test_a_bias_linear_in_the_distance_becomes_slopes():
    def attend(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = torch.arange(q.shape[2])
        slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)[:, None, None]
        return causal_scores(_products(q, k) + slopes * (tokens - tokens[:, None])).softmax(-1) @ v

    graph_module, site = assert_raised(attend)
    slopes = graph_module.get_buffer(str(site.kwargs["alibi_slopes"].target))  # type: ignore[union-attr]
    torch.testing.assert_close(slopes, torch.tensor([0.5, 0.25, 0.125, 0.0625]))


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return causal_scores(_products(q, k)).softmax(-1)


def _added_to_weights(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (_weights(q, k) + k[..., :1].transpose(-1, -2)) @ v


def _scores_of_the_tokens(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_scores(_products(q, k) + q[..., :1]).softmax(-1) @ v


def _no_product(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_scores(q[..., :1].expand(-1, -1, -1, q.shape[2])).softmax(-1) @ v


def _used_twice(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = _weights(q, k)
    return weights @ v + weights @ k


REFUSED = {
    "weights that other values join": (_added_to_weights, "are combined with other values before they meet", "add"),
    "scores that the tokens change": (
        _scores_of_the_tokens,
        "combined with values that depend on the token ids",
        "add",
    ),
    "scores that are no product": (_no_product, "whose scores are not a product of queries and keys", ""),
    "weights used twice": (_used_twice, "attention weights are used in 2 places", "softmax"),
}


@pytest.mark.parametrize(("attend", "reason", "op"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_attention_is_refused_at_the_node_that_rules_it_out(attend, reason, op):
    error = refusal(attend)
    assert reason in error.reason
    assert op in str(error.op)
