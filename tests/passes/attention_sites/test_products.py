"""Products of queries, keys, weights and values are the same in every spelling."""

import pytest
import torch
from torch import Tensor

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.raise_attention import RaiseAttention
from tests.passes.attention_sites.forms import assert_raised, causal_scores
from tests.passes.graphs import LONGEST, TinyModel, apply


def _einsum(scores: str, output: str):
    def attend(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum(output, causal_scores(torch.einsum(scores, q, k) * 0.5).softmax(-1), v)

    return attend


def _tokens_before_heads(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = causal_scores(torch.einsum("nqhd,nkhd->nhqk", q, k) * 0.5).softmax(-1)
    return torch.einsum("nhqk,nkhd->nqhd", weights, v).transpose(1, 2)


def _heads_last(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bijh", q, k) * 0.5
    tokens = torch.arange(q.shape[2])
    weights = scores.masked_fill((tokens > tokens[:, None])[:, :, None], -torch.inf).softmax(2)
    return torch.einsum("bijh,bhjd->bhid", weights, v)


def _groups(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bghid,bgjd->bghij", q.unflatten(1, (2, 2)), k) * 0.5
    return torch.einsum("bghij,bgjd->bghid", causal_scores(scores).softmax(-1), v).flatten(1, 2)


def _groups_inside(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhgid,bgjd->bhgij", q.unflatten(1, (2, 2)).transpose(1, 2), k) * 0.5
    return torch.einsum("bhgij,bgjd->bghid", causal_scores(scores).softmax(-1), v).flatten(1, 2)


def _keys_first(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhjd,bhid->bhij", k, q) * 0.5
    return torch.einsum("bhjd,bhij->bhid", v, causal_scores(scores).softmax(-1))


def _columns(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = torch.arange(q.shape[2])
    scores = (k @ q.transpose(-1, -2) * 0.5).masked_fill(tokens[:, None] > tokens, -torch.inf)
    return (v.transpose(-1, -2) @ scores.softmax(-2)).transpose(-1, -2)


def _one_head(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = causal_scores(torch.einsum("bhid,bjd->bhij", q, k[:, 0])).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v[:, 0])


def _keys_repeated(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = causal_scores(q @ k.repeat_interleave(2, 1).transpose(-1, -2)).softmax(-1)
    return torch.einsum("bghij,bgjd->bghid", weights.unflatten(1, (2, 2)), v).flatten(1, 2)


SPELLINGS = {
    "bhid,bhjd->bhij": (4, _einsum("bhid,bhjd->bhij", "bhij,bhjd->bhid")),
    "an ellipsis": (4, _einsum("...id,...jd->...ij", "...ij,...jd->...id")),
    "an implied result": (4, _einsum("abid,abjd->abij", "zyij, zyjd -> zyid")),
    "tokens before heads": (4, _tokens_before_heads),
    "heads last": (4, _heads_last),
    "groups of queries": (2, _groups),
    "groups inside": (2, _groups_inside),
    "keys times queries": (4, _keys_first),
    "softmax over columns": (4, _columns),
    "one head of keys": (1, _one_head),
    "one head of keys, broadcast": (1, lambda m, q, k, v: causal_scores(q @ k.transpose(-1, -2)).softmax(-1) @ v),
    "keys repeated, values grouped": (2, _keys_repeated),
}


@pytest.mark.parametrize(("kv_heads", "attend"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_read(kv_heads, attend):
    graph_module, _ = assert_raised(attend, kv_heads)
    (again,) = apply(graph_module, RaiseAttention(LONGEST))
    assert again.changed == 0


def _over_heads(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bgjd->bij", q, k)[:, None].expand(-1, 4, -1, -1)
    return causal_scores(scores).softmax(-1) @ v


def _squared(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = causal_scores(q @ k.transpose(-1, -2)).softmax(-1)
    return (weights @ weights) @ v


def _two_products(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_scores(q @ k.transpose(-1, -2) + k @ q.transpose(-1, -2)).softmax(-1) @ v


REFUSED = {
    "each operand summed by itself": ("are not a product of queries and keys", _over_heads),
    "weights times weights": ("does not sum over keys alone", _squared),
    "a sum of two products": ("combined with values that depend on the token ids", _two_products),
}


@pytest.mark.parametrize(("reason", "attend"), REFUSED.values(), ids=REFUSED)
def test_refuses(reason, attend):
    graph_module = capture(TinyModel(attend=attend))
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        apply(graph_module, DropNoops(), RaiseAttention(LONGEST))
    assert caught.value.node in {n.name for n in graph_module.graph.nodes}
