"""`unpad_tokens`: T holds the tokens of all rows."""

from emssd_compile.passes.graph import inputs
from emssd_compile.passes.unpad_tokens import UnpadTokens
from tests.passes.graphs import BATCH, canonical, model_with_attention, ops


def _names(graph_module):
    return [str(n.target) for n in inputs(graph_module.graph)]


def test_adds_what_describes_a_jagged_batch():
    graph_module, manager = canonical(model_with_attention())
    before = ops(graph_module)
    manager._run(UnpadTokens(BATCH, manager.fake_mode), "L2", graph_module)
    assert _names(graph_module) == ["input_ids", "positions", "row_ids", "offsets", "lengths", "logit_index"]
    assert ops(graph_module) - before == {"unsqueeze": 2}, "no op of the model changes"
    sizes = {n.target: n.meta["val"].dim() for n in inputs(graph_module.graph)}
    assert set(sizes.values()) == {1}
