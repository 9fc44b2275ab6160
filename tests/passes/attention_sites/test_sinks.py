"""Attention sinks: a learned logit a head in the softmax's sum, as a column or as a factor."""

import pytest
import torch
from torch import Tensor, fx

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.raise_attention import RaiseAttention
from tests.passes.attention_sites.forms import assert_raised, causal_scores, sinks_of
from tests.passes.graphs import HEADS, LONGEST, TinyModel, apply, eager, run


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return causal_scores(q @ k.transpose(-1, -2) * 0.5)


def _column(m: TinyModel, q: Tensor) -> Tensor:
    return sinks_of(m).reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)


def _last(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_scores(q, k), _column(m, q)], -1).softmax(-1)[..., :-1] @ v


def _shifted(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    joined = torch.cat([_scores(q, k), _column(m, q)], -1)
    return (joined - joined.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def _first(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    joined = torch.cat([_column(m, q), _scores(q, k)], -1)
    return (joined - joined.amax(-1, True)).softmax(-1)[..., 1:] @ v


def _by_einsum(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = causal_scores(torch.einsum("bhid,bhjd->bhij", q, k) * 0.5)
    return torch.einsum("bhij,bhjd->bhid", torch.cat([scores, _column(m, q)], -1).softmax(-1)[..., :-1], v)


def _one_more(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _scores(q, k)
    return torch.cat([scores, scores.new_zeros(1, HEADS, q.shape[2], 1)], -1).softmax(-1)[..., :-1] @ v


def _factor(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _scores(q, k)
    share = torch.sigmoid(torch.logsumexp(scores, -1) - sinks_of(m).view(1, -1, 1))
    return (scores.softmax(-1) @ v) * share.unsqueeze(-1)


def _capped(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = causal_scores(torch.tanh(q @ k.transpose(-1, -2) * 0.5 / 2.0) * 2.0)
    return torch.cat([scores, _column(m, q)], -1).softmax(-1)[..., :-1] @ v


SINKS = {
    "a last column": _last,
    "a last column, shifted by the largest": _shifted,
    "a first column": _first,
    "beside an einsum": _by_einsum,
    "one more in the sum": _one_more,
    "a factor on the output": _factor,
    "beside capped scores": _capped,
}


@pytest.mark.parametrize("attend", SINKS.values(), ids=SINKS)
def test_sinks_become_an_argument(attend):
    graph_module, site = assert_raised(attend)
    sinks = site.kwargs["sinks"]
    assert isinstance(sinks, fx.Node)
    assert tuple(sinks.meta["val"].shape) == (HEADS,)
    (again,) = apply(graph_module, RaiseAttention(LONGEST))
    assert again.changed == 0


@pytest.mark.parametrize("attend", [_last, _factor], ids=["column", "factor"])
def test_sinks_are_read_from_the_weights(attend):
    model = TinyModel(attend=attend)
    graph_module = capture(model)
    apply(graph_module, DropNoops(), RaiseAttention(LONGEST))
    with torch.no_grad():
        model.dense.bias.add_(2.0)
    torch.testing.assert_close(run(graph_module, 9), eager(model, 9), rtol=1e-5, atol=1e-5)


def test_a_shift_alone_is_no_sink():
    def attend(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = _scores(q, k)
        return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v

    _, site = assert_raised(attend)
    assert site.kwargs["sinks"] is None


def _two_columns(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_scores(q, k), _column(m, q), _column(m, q)], -1).softmax(-1)[..., :-2] @ v


def _per_position(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    column = m.table[: q.shape[2], :HEADS].T[None, :, :, None]
    return torch.cat([_scores(q, k), column], -1).softmax(-1)[..., :-1] @ v


def _of_tokens(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_scores(q, k), q[..., :1]], -1).softmax(-1)[..., :-1] @ v


def _kept(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.cat([_scores(q, k), _column(m, q)], -1).softmax(-1)
    return (weights[..., :-1] + 0.01) @ v


def _wrong_factor(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _scores(q, k)
    share = torch.sigmoid(2 * torch.logsumexp(scores, -1) - sinks_of(m).view(1, -1, 1))
    return (scores.softmax(-1) @ v) * share.unsqueeze(-1)


REFUSED = {
    "two columns": ("more than one tensor joins the scores", _two_columns),
    "a column for each position": ("not one logit a head, the same for every query", _per_position),
    "a column of the tokens'": ("combined with values that depend on the token ids", _of_tokens),
    "weights that are changed": ("does not act as an attention sink", _kept),
    "another factor": ("does not act as an attention sink", _wrong_factor),
}


@pytest.mark.parametrize(("reason", "attend"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_is_no_sink(reason, attend):
    graph_module = capture(TinyModel(attend=attend))
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        apply(graph_module, DropNoops(), RaiseAttention(LONGEST))
    assert caught.value.node in {n.name for n in graph_module.graph.nodes}
