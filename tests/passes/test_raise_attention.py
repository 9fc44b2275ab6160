"""`raise_attention`: every form that models write attention in becomes one op, or is refused."""

import math
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import attention
from emssd_compile.passes import raise_attention
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.mask_family import recognise
from emssd_compile.passes.raise_attention import RaiseAttention
from tests.passes.graphs import HEADS, LONGEST, TinyModel, apply, capture_and_apply, causal, eager, ops, run


def _causal(scores: Tensor) -> Tensor:
    tokens = torch.arange(scores.shape[-1])
    return scores.masked_fill(tokens > tokens[:, None], -torch.inf)


def _repeat_kv(x: Tensor) -> Tensor:
    """[1, 2, T, D] -> [1, 4, T, D] as Llama does."""
    return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def _three_dimensional(m: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = _causal(torch.bmm(q[0], k[0].transpose(1, 2)) * 0.5).softmax(-1)
    return torch.bmm(weights, v[0])[None]


def _baddbmm(m: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = torch.arange(q.shape[2])
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
    bias = slopes[:, None, None] * (tokens - tokens[:, None])
    scores = torch.baddbmm(bias, q[0], k[0].transpose(1, 2), beta=1.0, alpha=0.5)
    return torch.bmm(_causal(scores).softmax(-1), v[0])[None]


def _five_dimensional(m: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(1, (2, 2))
    weights = _causal(grouped @ k[:, :, None].transpose(-1, -2) * 0.5).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


FORMS = {
    "sdpa": (4, lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "sdpa with its own scale": (
        4,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
    ),
    "sdpa with enable_gqa": (
        2,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ),
    "sdpa, heads repeated by expand": (
        2,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, _repeat_kv(k), _repeat_kv(v), is_causal=True),
    ),
    "sdpa, heads repeated by repeat_interleave": (
        2,
        lambda m, q, k, v: F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
        ),
    ),
    "sdpa, one key/value head": (
        1,
        lambda m, q, k, v: F.scaled_dot_product_attention(
            q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1), is_causal=True
        ),
    ),
    "scale by mul": (4, lambda m, q, k, v: _causal(_scores(q, k) * 0.5).softmax(-1) @ v),
    "scale by div": (4, lambda m, q, k, v: _causal(_scores(q, k) / math.sqrt(4)).softmax(-1) @ v),
    "scale by a tensor": (4, lambda m, q, k, v: _causal(_scores(q, k) / torch.sqrt(torch.tensor(4.0))).softmax(-1) @ v),
    "scaled query": (4, lambda m, q, k, v: _causal(_scores(q * 0.5, k)).softmax(-1) @ v),
    "softmax in float64": (
        4,
        lambda m, q, k, v: _causal(_scores(q, k) * 0.5).softmax(-1, dtype=torch.float64).to(q.dtype) @ v,
    ),
    "softcap": (4, lambda m, q, k, v: _causal(torch.tanh(_scores(q, k) * 0.5 / 2.0) * 2.0).softmax(-1) @ v),
    "bmm on three dimensions": (4, _three_dimensional),
    "baddbmm with an ALiBi bias": (4, _baddbmm),
    "five dimensions, grouped": (2, _five_dimensional),
    "dropout that is off": (4, lambda m, q, k, v: F.dropout(_causal(_scores(q, k)).softmax(-1), 0.1, False) @ v),
}


@pytest.mark.parametrize(("kv_heads", "attend"), FORMS.values(), ids=FORMS)
def test_every_form_becomes_the_one_op(kv_heads, attend):
    model = TinyModel(attend=attend, kv_heads=kv_heads)
    graph_module, records = capture_and_apply(model, DropNoops(), RaiseAttention(LONGEST))
    assert records[-1].changed == 1
    found = ops(graph_module)
    assert found["attention"] == 1
    assert not found.keys() & {"softmax", "scaled_dot_product_attention", "bmm", "masked_fill", "arange"}
    (site,) = (n for n in graph_module.graph.nodes if n.target == attention)
    assert site.args[1].meta["val"].shape[1] == kv_heads, "repeated heads must not enter the KV cache"
    for tokens in (2, 9, 40):
        torch.testing.assert_close(run(graph_module, tokens), eager(model, tokens), rtol=1e-5, atol=1e-5)


def test_attention_gets_scale_window_and_softcap_as_attributes():
    attend = FORMS["softcap"][1]
    graph_module, _ = capture_and_apply(TinyModel(attend=attend), DropNoops(), RaiseAttention(LONGEST))
    (site,) = (n for n in graph_module.graph.nodes if n.target == attention)
    assert site.kwargs == {
        "scale": 0.5,
        "window": 0,
        "chunk": 0,
        "softcap": 2.0,
        "alibi_slopes": None,
        "sinks": None,
    }


def _layers(*attend):
    """Attentions behind one another, each of what the ones before it gave."""

    def attend_all(m: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in attend:
            q = layer(m, q, k, v) * 1.5
        return q

    return TinyModel(attend=attend_all)


def _banded(width: int):
    def attend(m: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = torch.arange(q.shape[2])
        seen = (tokens <= tokens[:, None]) & (tokens > tokens[:, None] - width)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return attend


def _spelled_out(factor: float, width: int = LONGEST):
    def attend(m: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = torch.arange(q.shape[2])
        far = tokens <= tokens[:, None] - width
        return _causal(_scores(q, k) * factor).masked_fill(far, -torch.inf).softmax(-1) @ v

    return attend


@pytest.mark.parametrize(
    ("layers", "evaluated"),
    [
        ((_banded(9), _banded(9), _banded(9)), 1),
        ((_banded(9), _banded(10), _banded(9)), 2),
        ((causal, causal, _banded(LONGEST)), 2),
        ((_spelled_out(0.5, 9), _spelled_out(0.5, 9)), 1),
        ((_spelled_out(0.5, 9), _spelled_out(0.25, 9), _spelled_out(0.5, 8)), 3),
    ],
)
def test_masks_that_layers_compute_alike_are_evaluated_once(monkeypatch, layers, evaluated):
    evaluating = Mock(wraps=recognise)
    monkeypatch.setattr(raise_attention, "recognise", evaluating)
    model = _layers(*layers)
    graph_module, _ = capture_and_apply(model, DropNoops(), RaiseAttention(LONGEST))
    assert evaluating.call_count == evaluated
    assert ops(graph_module)["attention"] == len(layers)
    torch.testing.assert_close(run(graph_module, 40), eager(model, 40), rtol=1e-5, atol=1e-5)


def test_a_second_run_changes_nothing():
    graph_module, _ = capture_and_apply(TinyModel(attend=FORMS["sdpa"][1]), DropNoops(), RaiseAttention(LONGEST))
    (record,) = apply(graph_module, RaiseAttention(LONGEST))
    assert record.changed == 0


def test_a_softmax_over_features_is_no_attention():
    model = TinyModel(lambda m, x, ids: x.softmax(-1))
    graph_module, records = capture_and_apply(model, DropNoops(), RaiseAttention(LONGEST))
    assert records[-1].changed == 0
    assert ops(graph_module)["softmax"] == 1


def _used_twice(m: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = _causal(_scores(q, k)).softmax(-1)
    return weights @ v + weights @ k


REFUSED = {
    "bidirectional sdpa": ("bidirectional", lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v)),
    "bidirectional eager": ("neither causal nor", lambda m, q, k, v: _scores(q, k).softmax(-1) @ v),
    "sdpa with dropout": (
        "dropout",
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1),
    ),
    "weights used twice": ("used in 2 places", _used_twice),
    "weights rescaled": ("are not softmax", lambda m, q, k, v: _causal(_scores(q, k)).softmax(-1) * 2 @ v),
    "scaled by the length": ("are not softmax", lambda m, q, k, v: _causal(_scores(q, k) / q.shape[2]).softmax(-1) @ v),
    "nonlinear scores": ("are not softmax", lambda m, q, k, v: _causal(_scores(q, k).relu()).softmax(-1) @ v),
    "a temperature per head": (
        "are not softmax",
        lambda m, q, k, v: _causal(_scores(q, k) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]).softmax(-1) @ v,
    ),
    "softmax over queries": ("not linear in the distance", lambda m, q, k, v: _causal(_scores(q, k)).softmax(-2) @ v),
    "weights transposed": (
        "neither causal nor",
        lambda m, q, k, v: _causal(_scores(q, k)).softmax(-1).transpose(-1, -2) @ v,
    ),
}


@pytest.mark.parametrize(("reason", "attend"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_cannot_express(reason, attend):
    graph_module = capture(TinyModel(attend=attend))
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        apply(graph_module, DropNoops(), RaiseAttention(LONGEST))
    assert caught.value.node in {n.name for n in graph_module.graph.nodes}
    assert str(caught.value.op).startswith("aten.")
    assert caught.value.module is not None
