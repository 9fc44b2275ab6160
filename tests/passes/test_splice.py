"""`splice`: what is traced holds for every size."""

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from emssd_compile.passes import manager
from emssd_compile.passes.graph import fake_result, fresh_index
from emssd_compile.passes.splice import trace
from tests.passes.graphs import compiled_model, step_with


def test_a_composite_op_is_traced_for_every_size():
    """In C++, torch 2.11's matmul reads sizes as numbers."""
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    weights = torch.randn(1, 8, 1)
    inputs = {"slots": fresh_index(fake_mode, torch.device("cpu"))}
    traced = trace(lambda given: {"result": weights @ given["slots"][None, None].float()}, inputs, fake_mode)
    for length in (1, 7, 12):
        slots = torch.arange(length)
        torch.testing.assert_close(traced(slots), [weights @ slots[None, None].float()])


def test_inputs_that_share_a_fake_value_are_told_apart():
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    with fake_mode:
        value = torch.zeros(3)
    traced = trace(lambda given: {"result": given["a"] - given["b"]}, {"a": value, "b": value}, fake_mode)
    assert traced(torch.ones(3), torch.zeros(3))[0].tolist() == [1, 1, 1]


def test_what_tracing_has_computed_is_right_and_not_computed_again(monkeypatch):
    own = len(compiled_model().graph_module.graph.nodes)
    computed: set[fx.Node] = set()

    def noted(node):
        computed.add(node)
        return fake_result(node)

    monkeypatch.setattr(manager, "fake_result", noted)
    step = step_with()
    calls = [node for node in step.graph_module.graph.nodes if node.op == "call_function"]
    assert len(computed.intersection(calls)) <= own, "the model's own, for other sizes"
    assert len(calls) > 5 * own
    known = [_described(node) for node in calls]
    for node in calls:
        del node.meta["val_basis"]
    manager.propagate(step.graph_module, step.compiled.fake_mode)
    assert [_described(node) for node in calls] == known


def _described(node):
    value = node.meta["val"]
    return manager._described(value) if isinstance(value, FakeTensor) else str(value)
