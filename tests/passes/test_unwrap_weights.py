"""`unwrap_weights`: a graph reads what a quantised weight consists of."""

from typing import Any

import torch
from torch import nn

from emssd_compile.capture import capture
from emssd_compile.passes.unwrap_weights import UnwrapWeights
from tests.exactness.models import build
from tests.passes.graphs import ops
from tests.quantised import with_weights


def test_the_parts_of_a_weight_are_attributes_and_those_of_the_model():
    model = build("llama")
    with_weights(model)
    graph_module = capture(model)
    given = torch.tensor([[3, 1, 4, 1, 5]]), torch.arange(5)[None]
    before = graph_module(*given)
    weights: list[Any] = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert UnwrapWeights().run(graph_module) == 2 * len(weights), "integers and scales"
    assert UnwrapWeights().run(graph_module) == 0
    assert ops(graph_module)["access_subclass_inner_tensor"] == 0
    graph_module.recompile()
    assert graph_module(*given).equal(before)
    held = {id(tensor) for tensor in graph_module.buffers()}
    assert {id(part) for weight in weights for part in (weight.integers, weight.scale)} <= held
