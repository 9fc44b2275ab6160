"""A captured graph is read as it was written, or is not written at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from emssd_compile.capture import capture
from emssd_compile.graph_text import UnwritableError, read, same, write
from emssd_compile.passes.graph import placeholder
from tests.passes.graphs import LONGEST, TinyModel, causal, run
from tests.zoo import toy_model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _written(model: nn.Module, graph_module: fx.GraphModule) -> str:
    return write(graph_module, {id(tensor): path for path, tensor in _tensors(model).items()})


# Between them: tied weights, constants made of numbers, einsums, experts, windows, ALiBi, arithmetic of sizes.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "bloom", "mistral", "qwen3_moe"])
def test_what_is_read_is_what_was_written(family):
    model = toy_model(family)
    captured = capture(model, 64)
    again = read(_written(model, captured), _tensors(model))
    assert same(captured, again)
    assert all(getattr(again, name) is parameter for name, parameter in captured.named_parameters())
    for tokens in (2, 7, 30):
        assert torch.equal(run(again, tokens), run(captured, tokens)), tokens


def _bounds(graph_module: fx.GraphModule) -> tuple[float, float]:
    size = placeholder(graph_module.graph, "input_ids").meta["val"].shape[1].node
    bounds = size.shape_env.bound_sympy(size.expr)
    return float(bounds.lower), float(bounds.upper)


@pytest.mark.parametrize("most", [LONGEST, float("inf")])
def test_the_numbers_of_tokens_that_a_graph_is_for_are_kept(most):
    cut = (lambda m, x, ids: x + m.table[: x.shape[1]]) if most == LONGEST else None
    model = TinyModel(cut, attend=causal)
    captured = capture(model, 16)
    assert _bounds(captured)[1] == most
    assert _bounds(read(_written(model, captured), _tensors(model))) == _bounds(captured)


def test_a_tensor_of_nobody_and_too_large_is_not_written():
    model = TinyModel(attend=causal)
    captured = capture(model)
    with pytest.raises(UnwritableError, match="is held"):
        write(captured, {})


def test_graphs_that_differ_in_one_argument_are_not_the_same():
    model = toy_model("llama")
    first, second = capture(model, 64), capture(model, 64)
    assert same(first, second)
    scaled = next(node for node in second.graph.nodes if node.target == torch.ops.aten.pow.Tensor_Scalar)
    scaled.args = (scaled.args[0], 3)
    assert not same(first, second)
