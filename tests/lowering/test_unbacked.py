"""The form that is compiled for all sizes: nothing is known of a size but that it is one, and not 0."""

import pytest
import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols, statically_known_true

from emssd_compile.drafters import PromptLookup
from emssd_compile.errors import BackendError
from emssd_compile.lowering.inductor import InductorStep
from emssd_compile.lowering.unbacked import _common_parts, unbacked
from emssd_compile.passes.graph import fresh_index, inputs, results
from emssd_compile.passes.splice import trace
from emssd_compile.step.signature import SIZE_NAMES
from tests.passes.graphs import model_with_attention, returned, step_of, unpadded


def test_sizes_of_a_step_become_unknowns_that_have_nothing_to_do_with_one_another():
    step = step_of(PromptLookup(3))
    graph = unbacked(step)
    shapes = {str(node.target): node.meta["val"].shape for node in inputs(graph.graph_module.graph)}
    sizes = [shapes[name][0] for name in SIZE_NAMES]
    for size in sizes:
        assert free_unbacked_symbols(size)
        assert statically_known_true(size >= 1)
        assert not statically_known_true(size > 1)
    assert len({size.node.expr for size in sizes}) == len(sizes)
    assert all(type(size) is int for name in shapes.keys() - SIZE_NAMES for size in shapes[name])
    assert [value.shape for value in graph.inputs] == list(shapes.values())


def test_inputs_that_share_a_size_go_on_sharing_it():
    graph_module, _ = unpadded(model_with_attention())
    output = graph_module.graph.output_node()
    hidden, logits = results(graph_module.graph)
    output.args = ({"hidden": hidden, "logits": logits},)
    shapes = {
        name: value.shape for name, value in zip(_names(graph_module), unbacked(graph_module).inputs, strict=True)
    }
    assert shapes["positions"] == shapes["row_ids"] == shapes["input_ids"]
    assert not statically_known_true(shapes["logit_index"][0] == shapes["input_ids"][0])


def test_the_graph_is_left_as_it_was_and_results_keep_their_names():
    step = step_of(PromptLookup(3))
    before = [(node.name, id(node.meta.get("val"))) for node in step.graph.nodes]
    graph = unbacked(step)
    assert [(node.name, id(node.meta.get("val"))) for node in step.graph.nodes] == before
    assert graph.result_names == tuple(returned(step))
    assert isinstance(graph.graph_module.graph.output_node().args[0], tuple)


def test_weights_are_shared():
    step = step_of(PromptLookup(3))
    ours = {tensor.data_ptr() for tensor in step.parameters()}
    theirs = {tensor.data_ptr() for tensor in unbacked(step).graph_module.parameters()}
    assert theirs
    assert theirs <= ours


def test_a_view_that_splits_one_dimension_and_merges_others_is_compiled_for_any_size():
    step = InductorStep(_graph_of_a_view())
    for count in (1, 2, 5):
        given = {"rows": torch.arange(3 * count).view(count, 3)}
        assert torch.equal(step(*given.values())["widened"], _widened(given)["widened"])


def test_what_would_be_compiled_for_one_size_only_is_refused(monkeypatch):
    """Inductor concludes from this view, as it stands, that there is one row, and would compile that."""
    monkeypatch.setattr("emssd_compile.lowering.unbacked._split_reshapes", lambda graph: None)
    with pytest.raises(BackendError, match="taken for 1"):
        InductorStep(_graph_of_a_view())(torch.arange(15).view(5, 3))


U = sympy.Symbol("u", integer=True, positive=True)


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ([4 * U, 3], [U, 12], [U, 4, 3]),
        ([U, 12], [4 * U, 3], [U, 4, 3]),
        ([1, 4 * U, 6], [2 * U, 4, 3], [1, 2 * U, 2, 2, 3]),
        ([U, 2, 3], [U, 6], [U, 2, 3]),
        ([6, U], [2, 3 * U], [2, 3, U]),
        ([U, 6], [U, 3, 2, 1], [U, 3, 2, 1]),
        ([0, U], [0], None),
        ([4, 3 * U], [3, 4 * U], None),
    ],
)
def test_the_parts_that_both_shapes_are_made_of(before, after, parts):
    before, after = ([sympy.sympify(size) for size in shape] for shape in (before, after))
    assert _common_parts(before, after) == parts


def _graph_of_a_view() -> fx.GraphModule:
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    rows = fresh_index(fake_mode, torch.device("cpu"))
    with fake_mode:
        fake = rows.new_empty((rows.shape[0], 3))
    graph_module = trace(_widened, {"rows": fake}, fake_mode)
    (widened,) = results(graph_module.graph)
    graph_module.graph.output_node().args = ({"widened": widened},)
    return graph_module


def _widened(given):
    """`[A, 3]` to `[A, 12]`."""
    rows = given["rows"]
    return {"widened": (rows.repeat_interleave(4, 0) * 2).view(rows.shape[0], 12) + 1}


def _names(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in inputs(graph_module.graph)]
