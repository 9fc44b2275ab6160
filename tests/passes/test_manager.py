"""The manager: cleans up, times, records, checks what passes promise, and says which one failed."""

from unittest.mock import Mock

import pytest
import torch
from torch import fx

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes import Level, PassManager, drop_unused_weights, manager
from emssd_compile.passes.graph import argument, aten, call, fake_result, output, placeholder
from emssd_compile.passes.manager import Refusal, propagate
from tests.passes.graphs import TinyModel, ops


class _Pass:
    """Does what the test says."""

    def __init__(self, name: str, run=lambda graph_module: 0, **promises) -> None:
        self.name, self.run = name, run
        for attribute, value in promises.items():
            setattr(self, attribute, value)


def _double_the_logits(graph_module: fx.GraphModule) -> int:
    result = output(graph_module.graph)
    with graph_module.graph.inserting_before(result):
        call(graph_module.graph, aten.neg.default, result.args[0])  # dead
        result.args = (call(graph_module.graph, aten.mul.Tensor, result.args[0], 2),)
    return 1


def _manager() -> tuple[fx.GraphModule, PassManager]:
    graph_module = capture(TinyModel())
    return graph_module, PassManager(placeholder(graph_module.graph, "input_ids").meta["val"].fake_mode)


def _fine(graph_module: fx.GraphModule) -> None:
    return None


def test_records_what_each_pass_did():
    graph_module, manager = _manager()
    note, refusal = "seen", Refusal("linear", "left alone")
    before = len(graph_module.graph.nodes)
    steps = (_Pass("look", notes=["seen"], refusals=[refusal]), _Pass("double", _double_the_logits))
    manager.apply(graph_module, (Level("L9", steps, _fine),))
    look, double = manager.records
    assert (look.name, look.level, look.changed, look.notes, look.refusals) == ("look", "L9", 0, (note,), (refusal,))
    assert (look.nodes_before, look.nodes_after) == (before, before)
    assert (double.changed, double.nodes_before, double.nodes_after) == (1, before, before + 1)
    assert double.seconds > 0


def test_cleans_up_after_a_pass_that_changed_something():
    graph_module, manager = _manager()
    ids, positions = torch.tensor([[3, 1]]), torch.arange(2)[None]
    expected = graph_module(ids, positions) * 2
    manager.apply(graph_module, (Level("L9", (_Pass("double", _double_the_logits),), _fine),))
    assert ops(graph_module)["neg"] == 0, "dead code is out"
    assert torch.equal(graph_module(ids, positions), expected), "the code is that of the new graph"
    assert argument(output(graph_module.graph), 0).meta["val"].shape[-1] == 32, "fake values are there"


def test_an_unexpected_exception_names_the_pass_and_those_before_it():
    graph_module, manager = _manager()

    def fail(_: fx.GraphModule) -> int:
        raise ZeroDivisionError("oh")

    level = Level("L9", (_Pass("first"), _Pass("second"), _Pass("third", fail)), _fine)
    with pytest.raises(UnsupportedModelError, match=r"pass third failed with ZeroDivisionError: oh .*first, second"):
        manager.apply(graph_module, (level,))
    assert [record.name for record in manager.records] == ["first", "second"]


def test_a_promise_is_checked_on_the_result_even_if_nothing_changed():
    graph_module, manager = _manager()
    seen: list[fx.GraphModule] = []
    manager.apply(graph_module, (Level("L9", (_Pass("look", ensures=seen.append),), _fine),))
    assert seen == [graph_module]

    def broken(_: fx.GraphModule) -> None:
        raise UnsupportedModelError("promise broken")

    with pytest.raises(UnsupportedModelError, match=r"^promise broken$"):
        manager.apply(graph_module, (Level("L9", (_Pass("look", ensures=broken),), _fine),))


def test_a_level_is_verified_once_after_its_last_pass():
    graph_module, manager = _manager()
    order: list[str] = []

    def note(name: str) -> int:
        order.append(name)
        return 0

    steps = tuple(_Pass(name, lambda _, name=name: note(name)) for name in ("a", "b"))
    manager.apply(graph_module, (Level("L8", steps, lambda _: order.append("verified")),))
    assert order == ["a", "b", "verified"]


def test_observers_see_the_graph_before_and_after_every_pass():
    graph_module, _ = _manager()
    seen: list[tuple[str, int, bool]] = []
    fake_mode = placeholder(graph_module.graph, "input_ids").meta["val"].fake_mode
    manager = PassManager(
        fake_mode, [lambda name, module, record: seen.append((name, ops(module)["mul"], record is not None))]
    )
    manager.apply(graph_module, (Level("L9", (_Pass("double", _double_the_logits),), _fine),))
    assert seen == [("double", 0, False), ("double", 1, True)]


def test_fake_values_follow_a_changed_input():
    """Only what changed is computed anew; everything that reads it is."""
    graph_module, manager = _manager()
    linear = next(n for n in graph_module.graph.nodes if n.target == aten.linear.default)
    propagate(graph_module, manager.fake_mode)
    with graph_module.graph.inserting_before(linear):
        weight = call(graph_module.graph, aten.slice.Tensor, linear.args[1], 0, 0, 20)
    linear.args = (linear.args[0], weight)
    propagate(graph_module, manager.fake_mode)
    assert linear.meta["val"].shape[-1] == 20


def test_fake_values_of_what_is_done_alike_are_computed_once(monkeypatch):
    """Of the same op, the same numbers and tensors that say the same, but for sizes that only values tell."""
    graph_module, pass_manager = _manager()
    propagate(graph_module, pass_manager.fake_mode)
    computing = Mock(wraps=fake_result)
    monkeypatch.setattr(manager, "fake_result", computing)
    graph, source = graph_module.graph, argument(output(graph_module.graph), 0)
    ids = placeholder(graph, "input_ids")
    with graph.inserting_before(output(graph)):
        alike = [graph.call_function(aten.add.Tensor, (source, 2)) for _ in range(3)]
        alike += [graph.call_function(aten.mul.Tensor, (node, node)) for node in alike]
        others = [graph.call_function(aten.sum.dim_IntList, (source, [-1], keeps)) for keeps in (True, False)]
        others += [graph.call_function(aten.add.Tensor, (ids, n)) for n in (2, 2.0)]
        unknown = [graph.call_function(aten.nonzero.default, (ids,)) for _ in range(2)]
    propagate(graph_module, pass_manager.fake_mode)
    computed = [given.args[0] for given in computing.call_args_list]
    assert computed == [alike[0], alike[3], *others, *unknown]
    assert [node.meta["val"].shape for node in alike] == [source.meta["val"].shape] * 6
    assert [node.meta["val"].dim() for node in others[:2]] == [3, 2]
    assert [node.meta["val"].dtype for node in others[2:]] == [torch.int64, torch.float32]


def test_a_fake_value_that_comes_out_as_it_was_is_kept():
    """What reads it is not computed anew then."""
    graph_module, manager = _manager()
    linear = next(n for n in graph_module.graph.nodes if n.target == aten.linear.default)
    propagate(graph_module, manager.fake_mode)
    before = {node: node.meta["val"] for node in graph_module.graph.nodes if node.op == "call_function"}
    with graph_module.graph.inserting_before(linear):
        linear.args = (linear.args[0], call(graph_module.graph, aten.neg.default, linear.args[1]))
    propagate(graph_module, manager.fake_mode)
    assert all(node.meta["val"] is value for node, value in before.items())
    linear.args = (linear.args[0], linear.args[1].args[0], None)
    linear.meta["val"] = linear.meta["val"].to(torch.float64)
    linear.meta["val_basis"] = ()
    propagate(graph_module, manager.fake_mode)
    assert linear.meta["val"].dtype is torch.float32, "it says something else"


def test_unused_weights_are_forgotten():
    graph_module, _ = _manager()
    graph_module.register_buffer("unused", torch.zeros(3))
    drop_unused_weights(graph_module)
    assert {name for name, _ in graph_module.named_parameters()} == {"embed_weight", "lm_head_weight"}
    assert not dict(graph_module.named_buffers())
