"""Of the forms that an attention nearly has, one says why it is refused: the nearest, and of those the first."""

import torch
from torch import Tensor

from emssd_compile.capture import capture
from emssd_compile.passes.attention_sites import find_site
from emssd_compile.passes.attention_sites.form import Subject
from emssd_compile.passes.graph import aten, data_dependent
from tests.passes.attention_sites.forms import causal_scores, refusal, sinks_of
from tests.passes.graphs import TinyModel


def _column(m: TinyModel, q: Tensor) -> Tensor:
    return sinks_of(m).reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)


def test_of_forms_that_are_as_near_the_first_says_why():
    """The one without sinks would only say that scores are joined."""

    def attend(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = causal_scores(q @ k.transpose(-1, -2))
        return torch.cat([scores, _column(m, q), _column(m, q)], -1).softmax(-1)[..., :-2] @ v

    error = refusal(attend)
    assert "more than one tensor joins the scores" in error.reason
    assert error.op == "aten.cat.default"


def test_what_is_the_heart_of_no_attention_is_left_alone():
    graph_module = capture(TinyModel(lambda m, x, ids: x.softmax(-1)))
    subject, nodes = Subject(graph_module, data_dependent(graph_module.graph)), graph_module.graph.nodes
    assert [find_site(subject, node) for node in nodes].count(None) == len(nodes)


def test_inputs_that_vary_are_those_that_the_token_ids_reach():
    graph_module = capture(TinyModel())
    subject = Subject(graph_module, data_dependent(graph_module.graph))
    (embedding,) = (n for n in graph_module.graph.nodes if n.target == aten.embedding.default)
    assert [node.name for node in subject.varying(embedding)] == ["input_ids"]
