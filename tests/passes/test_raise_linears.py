"""`raise_linears`: what a drafter's layers were traced as are layers again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from emssd_compile.passes.graph import aten
from emssd_compile.passes.raise_linears import RaiseLinears
from tests.passes.graphs import ops


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3))
        self.one = nn.Parameter(torch.randn(1))
        self.square, self.whole = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(4, 3))


X = torch.randn(4, 5)


def graph_of(product: Any, *names: str, turn: Any = aten.t.default, turned: Any = ()) -> fx.GraphModule:
    """`product(*, turn(weight))` of x and of parameters by name, the last of which is turned."""
    layer, graph = Layer(), fx.Graph()
    x = graph.placeholder("x")
    *given, weight = (x if name == "x" else graph.get_attr(name) for name in names)
    out = graph.call_function(product, (*given, graph.call_function(turn, (weight, *turned)) if turn else weight))
    graph.output(out)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in graph.nodes:
            if node.op == "get_attr":
                node.meta["val"] = getattr(layer, node.target)
    x.meta["val"] = X
    return fx.GraphModule(layer, graph)


@pytest.mark.parametrize("names", [("x", "weight"), ("bias", "x", "weight")], ids=["mm", "addmm"])
@pytest.mark.parametrize(
    ("turn", "turned"),
    [(aten.t.default, ()), (aten.permute.default, ([1, 0],)), (aten.transpose.int, (0, 1))],
    ids=["t", "permute", "transpose"],
)
def test_a_product_with_a_transposed_weight_is_a_layer(names, turn, turned):
    product = aten.mm.default if len(names) == 2 else aten.addmm.default
    graph_module = graph_of(product, *names, turn=turn, turned=turned)
    assert RaiseLinears().run(graph_module) == 1
    assert (ops(graph_module)["linear"], ops(graph_module)["mm"], ops(graph_module)["addmm"]) == (1, 0, 0)
    graph_module.recompile()
    weights = dict(graph_module.named_parameters())
    expected = F.linear(X, weights["weight"], weights["bias"] if len(names) == 3 else None)
    torch.testing.assert_close(graph_module(X), expected)
    assert RaiseLinears().run(graph_module) == 0


def test_other_products_are_left_alone():
    not_turned = graph_of(aten.mm.default, "x", "square", turn=None)
    turned_nowhere = graph_of(aten.mm.default, "x", "square", turn=aten.permute.default, turned=([0, 1],))
    one_for_all = graph_of(aten.addmm.default, "one", "x", "weight")
    not_a_bias = graph_of(aten.addmm.default, "whole", "x", "weight")
    scaled = graph_of(aten.addmm.default, "bias", "x", "weight")
    next(node for node in scaled.graph.nodes if node.target == aten.addmm.default).kwargs = {"alpha": 2}
    computed = graph_of(aten.mm.default, "x", "x")
    for graph_module in (not_turned, turned_nowhere, one_for_all, not_a_bias, scaled, computed):
        before = str(graph_module.graph)
        assert RaiseLinears().run(graph_module) == 0
        assert str(graph_module.graph) == before
