"""Attention in the spellings of the tests, as functions for `tests.passes.graphs.TinyModel`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import attention
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.raise_attention import RaiseAttention
from tests.passes.graphs import HEADS, LONGEST, Attend, TinyModel, apply, capture_and_apply, eager, run


def causal_scores(scores: Tensor) -> Tensor:
    """Scores [.., query, key] with the keys behind each query masked."""
    tokens = torch.arange(scores.shape[-1])
    return scores.masked_fill(tokens > tokens[:, None], -torch.inf)


def sinks_of(model: TinyModel) -> Tensor:
    """A learned logit for each of the model's heads."""
    return model.dense.bias[:HEADS]


def site_of(model: TinyModel) -> tuple[fx.GraphModule, fx.Node]:
    """The graph of `model` with its one attention raised, and that attention."""
    graph_module, _ = capture_and_apply(model, DropNoops(), RaiseAttention(LONGEST))
    (site,) = (n for n in graph_module.graph.nodes if n.target == attention)
    return graph_module, site


def assert_raised(attend: Attend, kv_heads: int = HEADS) -> tuple[fx.GraphModule, fx.Node]:
    """`attend` becomes the one op, with `kv_heads` heads in its cache, and computes what it did."""
    model = TinyModel(attend=attend, kv_heads=kv_heads)
    graph_module, site = site_of(model)
    assert site.args[1].meta["val"].shape[1] == site.args[2].meta["val"].shape[1] == kv_heads  # type: ignore[union-attr]
    for tokens in (2, 9, 40):
        torch.testing.assert_close(run(graph_module, tokens), eager(model, tokens), rtol=1e-5, atol=1e-5)
    return graph_module, site


def attributes(attend: Attend, kv_heads: int = HEADS) -> dict[str, object]:
    """Those of the one op that `attend` becomes, without those that are 0 or None."""
    _, site = assert_raised(attend, kv_heads)
    return {name: value for name, value in site.kwargs.items() if value}


def refusal(attend: Attend) -> UnsupportedModelError:
    """The error for a model whose attention is of no form."""
    with pytest.raises(UnsupportedModelError) as caught:
        apply(capture(TinyModel(attend=attend)), DropNoops(), RaiseAttention(LONGEST))
    return caught.value
