"""`hoist_scales`: integers are multiplied as they are, and what comes out is scaled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from emssd_compile.passes.graph import aten
from emssd_compile.passes.group_linears import GroupLinears
from emssd_compile.passes.hoist_scales import HoistScales
from emssd_compile.passes.raise_linears import RaiseLinears
from tests.passes.graphs import ops


class Layer(nn.Module):
    """A linear layer of integers."""

    def __init__(self, product: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.integers = nn.Buffer(torch.randint(-128, 128, (3, 5), dtype=torch.int8))
        self.bytes = nn.Buffer(torch.randint(0, 256, (3, 5), dtype=torch.uint8))
        self.scale, self.columns = nn.Buffer(torch.rand(3, 1) + 0.1), nn.Buffer(torch.rand(1, 5) + 0.1)
        self.one = nn.Buffer(torch.rand(()) + 0.1)
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, x)


def traced(product: Callable[[Layer, Tensor], Tensor]) -> tuple[fx.GraphModule, Layer]:
    layer = Layer(product)
    program = torch.export.export(layer, (torch.randn(4, 5),), strict=False)
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    fakes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = next(v for name, v in fakes.items() if name.endswith(f"_{node.target}"))
        elif node.name in fakes:
            node.meta["val"] = fakes[node.name]
        if str(node.target) == "aten.to.dtype":
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": torch.float32}
    return graph_module, layer


FITTING: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "a scale for each row": lambda s, x: F.linear(x, s.integers.to(x.dtype) * s.scale),
    "the scale first": lambda s, x: F.linear(x, s.scale * s.integers.to(x.dtype)),
    "one scale": lambda s, x: F.linear(x, s.integers.to(x.dtype) * s.one),
    "a bias": lambda s, x: F.linear(x, s.integers.to(x.dtype) * s.scale, s.bias),
}
LEFT: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "a scale for each column": lambda s, x: F.linear(x, s.integers.to(x.dtype) * s.columns),
    "weights that are scaled twice": lambda s, x: F.linear(x, (s.integers.to(x.dtype) * s.scale) * s.one),
    "other integers": lambda s, x: F.linear(x, s.bytes.to(x.dtype) * s.scale),
}


@pytest.mark.parametrize("product", FITTING.values(), ids=FITTING)
def test_scales_leave_the_product(product):
    graph_module, layer = traced(product)
    x = torch.randn(4, 5)
    assert HoistScales().run(graph_module) == 1
    assert HoistScales().run(graph_module) == 0
    graph_module.graph.eliminate_dead_code()  # as the manager does behind each pass
    graph_module.recompile()
    torch.testing.assert_close(graph_module(x), layer(x))
    GroupLinears().run(graph_module)
    assert (ops(graph_module)["grouped_linear"], ops(graph_module)["_to_copy"]) == (1, 0), "no weight is written out"
    graph_module.recompile()
    torch.testing.assert_close(graph_module(x), layer(x))


@pytest.mark.parametrize("product", LEFT.values(), ids=LEFT)
def test_other_products_stay_as_they_are(product):
    assert HoistScales().run(traced(product)[0]) == 0


TURNED: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "cast, then turned": lambda s, x: torch.mm(x, s.integers.to(x.dtype).t()) * s.scale.flatten(),
    "turned, then cast": lambda s, x: torch.mm(x, s.integers.t().to(x.dtype)) * s.scale.flatten(),
}


@pytest.mark.parametrize("product", TURNED.values(), ids=TURNED)
def test_products_with_turned_integers_stream_them(product):
    graph_module, layer = traced(product)
    x = torch.randn(4, 5)
    assert (RaiseLinears().run(graph_module), GroupLinears().run(graph_module)) == (1, 1)
    graph_module.graph.eliminate_dead_code()
    assert (ops(graph_module)["grouped_linear"], ops(graph_module)["_to_copy"]) == (1, 0)
    graph_module.recompile()
    torch.testing.assert_close(graph_module(x), layer(x))
