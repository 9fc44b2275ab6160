"""`sampled_evaluator`: what a node holds at chosen places is what it holds there when all places are computed."""

import pytest
import torch
from torch import Tensor

from emssd_compile.capture import capture
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.graph import Evaluator
from emssd_compile.passes.sampled_evaluator import SampledEvaluator, UnevaluatedError
from tests.passes.graphs import TinyModel, apply

PLACES = torch.tensor([0, 1, 5, 29, 30, 58, 59])


def _count(t: int) -> Tensor:
    return torch.arange(t)


RELATIONS = {
    "comparison": lambda m, t: _count(t)[:, None] >= _count(t),
    "comparisons combined": lambda m, t: (_count(t)[:, None] >= _count(t)) & (_count(t)[:, None] - _count(t) < 7),
    "corner of a table": lambda m, t: m.tril[:t, :t],
    "another corner of a table": lambda m, t: m.tril[4 : t + 4, :t],
    "triangle of ones": lambda m, t: torch.ones(t, t).tril(),
    "band": lambda m, t: torch.full((t, t), 2.0).tril(3).triu(-t // 2),
    "by the number of tokens": lambda m, t: _count(t)[:, None] + _count(t) >= t,
    "filled and transposed": lambda m, t: torch.zeros(t, t).masked_fill(_count(t)[:, None] >= _count(t), 1.0).mT[None],
    "a table looked up": lambda m, t: m.table[_count(t), 0][:, None] * m.table[_count(t), 1],
    "counted by a sum": lambda m, t: torch.ones(t).cumsum(0)[:, None] - torch.ones(t).cumsum(0),
    "with heads": lambda m, t: torch.ones(4)[:, None, None] * (_count(t)[:, None] - _count(t)),
    "a select": lambda m, t: torch.where(_count(t)[:, None] >= _count(t), 0.0, -1.0),
    "no rule, few elements": lambda m, t: (_count(t)[:, None] >= _count(t)).float().roll(1, 1),
}


def _node(relation):
    """The graph of a model that ends with a relation of tokens to tokens, and the node that computes it."""
    model = TinyModel(lambda m, x, ids: (relation(m, x.shape[1]) + 0 * x[..., 0, None]).sum(-1)[..., None] * x)
    graph_module = capture(model)
    apply(graph_module, DropNoops())
    total = next(n for n in graph_module.graph.nodes if "sum" in str(n.target) and "cumsum" not in str(n.target))
    return graph_module, total.args[0].args[0]


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_the_places_of_the_whole(relation):
    graph_module, node = _node(relation)
    whole = Evaluator(graph_module, 60)(node)
    some = SampledEvaluator(graph_module, PLACES)(node)
    assert torch.equal(some, whole[..., PLACES, :][..., PLACES])


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_all_places_are_the_whole(relation):
    graph_module, node = _node(relation)
    assert torch.equal(SampledEvaluator(graph_module, torch.arange(60))(node), Evaluator(graph_module, 60)(node))


def test_a_relation_without_a_rule_is_not_computed_if_it_is_large():
    graph_module, node = _node(RELATIONS["no rule, few elements"])
    with pytest.raises(UnevaluatedError, match="holds 10000000000 elements for 100000 tokens"):
        SampledEvaluator(graph_module, torch.tensor([0, 99_999]))(node)


def test_what_comes_from_given_values_takes_the_places_for_all_there_is():
    graph_module, node = _node(lambda m, t: (1.0 * (_count(t)[:, None] - _count(t))).softmax(-1))
    (scores,) = node.all_input_nodes
    given = torch.arange(49.0).view(7, 7)
    value = SampledEvaluator(graph_module, PLACES, {scores: given})(node)
    torch.testing.assert_close(value, given.softmax(-1))


def test_token_ids_have_no_value():
    graph_module, _ = _node(RELATIONS["comparison"])
    embedding = next(n for n in graph_module.graph.nodes if "embedding" in str(n.target))
    with pytest.raises(KeyError, match="depends on the token ids"):
        SampledEvaluator(graph_module, PLACES)(embedding)
