"""`explain()`: what each pass did and refused, and what the step holds."""

import pytest

import emssd_compile
from emssd_compile.passes.manager import PassRecord, Refusal
from emssd_compile.report import Explanation
from emssd_compile.stats import Stats
from tests.passes.graphs import model_with_attention


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    model = model_with_attention()
    return emssd_compile.optimize(model, max_batch=2, max_length=32, backend="eager").explain()


def test_every_pass_of_every_level_is_there_in_order(explanation):
    levels = [record.level for record in explanation.records]
    assert levels == sorted(levels)
    assert set(levels) == {"L0", "L1", "L2", "L3"}
    assert explanation.record("raise_attention").changed == 1
    assert explanation.record("prove_token_pointwise").notes == ("proved: nothing but attention mixes tokens",)


def test_the_step_is_one_graph_without_padding(explanation):
    assert explanation.num_graphs == 1
    assert explanation.padding_ops == 0
    assert explanation.ops["emssd.ragged_attention.default"] == 1
    assert explanation.ops["emssd.append_kv.default"] == 1


def test_printing_it_shows_passes_and_ops(explanation):
    text = str(explanation)
    for record in explanation.records:
        assert record.name in text
    assert "proved: nothing but attention mixes tokens" in text
    assert "1 ragged_attention, 1 append_kv, 0 padding ops" in text


def test_a_refusal_is_shown_with_its_node_and_reason():
    record = PassRecord("fuse_projections", "L2", 0, 5, 5, 0.01, refusals=(Refusal("linear_3", "a weight is shared"),))
    assert "left %linear_3: a weight is shared" in str(Explanation((record,), {}))


def test_padding_ops_are_counted():
    assert Explanation((), {"aten._nested_to_padded.default": 2, "aten.pad_sequence.default": 1}).padding_ops == 3


def test_a_notebook_is_shown_it_once_and_as_html(explanation, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    shown = []
    monkeypatch.setattr("rich.jupyter.display", lambda *what: shown.append(what))
    text, html = str(explanation), explanation._repr_html_()
    assert not shown, "making a text shows nothing"
    assert "raise_attention" in text
    assert "<pre>" in html
    assert "raise_attention" in html


def test_a_notebook_shows_stats_as_a_table():
    stats = Stats(num_steps=3, num_row_steps=4, num_draft_tokens=8, num_accepted_draft_tokens=2)
    html = stats._repr_html_()
    for name, value in {"num_steps": "3", "mean_acceptance_length": "1.50", "draft_acceptance_rate": "25%"}.items():
        assert f"<th>{name}</th><td>{value}</td>" in html
