"""`LogitContext`: the text that each logit goes on from, drafts on the way included."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import in_use
from tests.logits.contexts import CAPACITY, Line, context


@st.composite
def _rows(draw: st.DrawFn, trees: bool) -> list[Line]:
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        text = draw(st.lists(st.integers(0, 50), min_size=1, max_size=CAPACITY))
        drafts = draw(st.lists(st.integers(51, 90), max_size=5))
        parents = [draw(st.integers(0, i)) if trees else i for i in range(len(drafts))]
        rows.append(Line(text, drafts, parents))
    return rows


@settings(max_examples=150)
@given(data=st.data(), trees=st.booleans(), count=st.integers(1, 15), tail=st.integers(0, 2))
def test_the_newest_tokens_are_those_of_the_text_and_of_the_drafts_on_the_way(data, trees, count, tail):
    rows = data.draw(_rows(trees), label="rows")
    newest = context(rows, 5, trees=trees, tail=tail).newest(count).tolist()
    expected = []
    for row in rows:
        for node in range(len(row.drafts) + 1):
            text = [*[-1] * count, *row.text, *row.path(node)]
            expected.append(text[len(text) - count :])
    assert newest[: len(expected)] == expected


@settings(max_examples=150)
@given(data=st.data(), trees=st.booleans(), tail=st.integers(0, 2))
def test_texts_are_whole_and_drafts_beside_the_way_are_none_of_them(data, trees, tail):
    rows = data.draw(_rows(trees), label="rows")
    texts = context(rows, 5, trees=trees, tail=tail).texts().tolist()
    expected = [[*row.text, *row.path(node)] for row in rows for node in range(len(row.drafts) + 1)]
    assert texts[: len(expected)] == [[*text, *[-1] * (CAPACITY + 5 - len(text))] for text in expected]


def test_without_drafts_the_text_is_all_there_is():
    seen = context([Line([3, 1, 4], [], []), Line([5], [], [])], 0, trees=False)
    assert seen.newest(2).tolist() == [[1, 4], [-1, 5]]
    assert seen.texts()[:, :4].tolist() == [[3, 1, 4, -1], [5, -1, -1, -1]]


def test_an_option_is_that_of_the_row_of_each_logit():
    seen = context([Line([3], [7], [0]), Line([5], [], [])], 1, trees=False)
    seen.options["x"] = torch.tensor([[1, 2], [3, 4]])
    assert seen.option("x").tolist() == [[1, 2], [1, 2], [3, 4]]


class _Always(LogitsProcessor):
    def forward(self, context: LogitContext) -> Processed:
        return Processed(context.logits)


class _Asked(_Always):
    def options(self) -> dict[str, RowOption]:
        return {"x": RowOption(0), "y": RowOption(0)}


def test_a_processor_is_in_use_where_one_of_its_options_is_or_where_it_has_none():
    always, asked = _Always(), _Asked()
    assert in_use([asked, always], ()) == {1: always}
    assert in_use([asked, always], {"z"}) == {1: always}
    assert in_use([asked, always], {"y", "z"}) == {0: asked, 1: always}
