"""`separate_results`: no result is an input, and none is another result."""

import pytest

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.graph import inputs, output, results
from emssd_compile.passes.separate_results import SeparateResults
from tests.passes.graphs import model_with_attention, returned, unpadded


def test_copies_inputs_and_what_is_returned_twice():
    graph_module, manager = unpadded(model_with_attention())
    hidden, logits = results(graph_module.graph)
    ids = inputs(graph_module.graph)[0]
    output(graph_module.graph).args = ({"hidden": hidden, "again": hidden, "ids": ids, "logits": logits},)
    manager._run(SeparateResults(), "target", graph_module)
    assert manager.records[-1].changed == 2
    found = returned(graph_module)
    assert (found["hidden"], found["logits"]) == (hidden, logits)
    assert (found["again"].args, found["ids"].args) == ((hidden,), (ids,))

    manager._run(SeparateResults(), "target", graph_module)
    assert manager.records[-1].changed == 0


@pytest.mark.parametrize("shared", ["an input", "a result"])
def test_says_so_if_a_result_has_no_value_of_its_own(shared):
    graph_module, _ = unpadded(model_with_attention())
    hidden, _ = results(graph_module.graph)
    other = {"an input": inputs(graph_module.graph)[0], "a result": hidden}[shared]
    output(graph_module.graph).args = ({"hidden": hidden, "other": other},)
    with pytest.raises(UnsupportedModelError, match="the result 'other' has no value of its own") as raised:
        SeparateResults().ensures(graph_module)
    assert raised.value.node == other.name


def test_refuses_results_without_names():
    graph_module, manager = unpadded(model_with_attention())
    with pytest.raises(UnsupportedModelError, match="must return its results by name"):
        manager._run(SeparateResults(), "target", graph_module)
