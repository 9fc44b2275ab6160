"""`scaled_dot_product_attention` with a mask or `is_causal` is the op; what it cannot be is refused by its call."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.passes.attention_sites.forms import attributes, refusal
from tests.passes.graphs import HEADS, LONGEST, TinyModel


def _distance(tokens: int) -> Tensor:
    return torch.arange(tokens)[:, None] - torch.arange(tokens)


def _window(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = _distance(q.shape[2])
    return scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < 5))


def _added(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(_distance(q.shape[2]) < 0, -torch.inf)
    return scaled_dot_product_attention(q, k, v, mask, scale=0.3)


def _without_a_batch(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)[None]


def _in_groups(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1) for x in (k, v))
    return scaled_dot_product_attention(q.unflatten(1, (2, 2)), k, v, is_causal=True).flatten(1, 2)


CALLS = {
    "is_causal": (lambda m, q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), HEADS, {"scale": 0.5}),
    "a window": (_window, HEADS, {"scale": 0.5, "window": 5}),
    "an added mask and a scale": (_added, HEADS, {"scale": 0.3}),
    "three dimensions": (_without_a_batch, HEADS, {"scale": 0.5}),
    "five dimensions": (_in_groups, HEADS // 2, {"scale": 0.5}),
}


@pytest.mark.parametrize(("attend", "kv_heads", "expected"), CALLS.values(), ids=CALLS)
def test_a_call_becomes_the_op_with_what_it_says(attend, kv_heads, expected):
    assert attributes(attend, kv_heads) == expected


def _padded(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = (_distance(q.shape[2]) >= 0) & (k[:, :1, :, 0] > 0)[:, :, None]
    return scaled_dot_product_attention(q, k, v, seen)


def _beyond(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, _distance(q.shape[2]) >= -1)


REFUSED = {
    "no mask": (lambda m, q, k, v: scaled_dot_product_attention(q, k, v), "attention is bidirectional"),
    "dropout": (
        lambda m, q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1),
        "attention has dropout",
    ),
    "a mask of the tokens'": (_padded, "depends on token ids"),
    "one token ahead": (_beyond, "neither causal nor a sliding window"),
}


@pytest.mark.parametrize(("attend", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_causal_attention_is_refused_at_its_call(attend, reason):
    error = refusal(attend)
    assert reason in error.reason
    assert error.op == "aten.scaled_dot_product_attention.default"


def test_the_mask_is_looked_at_up_to_the_longest_row():
    def attend(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = _distance(q.shape[2])
        return scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < LONGEST - 1))

    assert attributes(attend)["window"] == LONGEST - 1
