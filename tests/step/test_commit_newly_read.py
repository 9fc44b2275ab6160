"""`newly_read`: the tokens that a step has read for good, and where they lay in it, against plain Python."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.step.acceptance import Verdict
from emssd_compile.step.commit import commit, newly_read
from emssd_compile.step.pack import as_trees, pack
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.state import StepState

CAPACITY, VOCABULARY, K, NEXT = 20, 100, 4, 99


@dataclass
class Line:
    """One row.

    Attributes:
        text: its tokens, of which `num_read` are read.
        drafts, parents: what it verifies if there is room.
        luck: which child of each node is accepted, if any: a number for each depth, negative for none.
        limit: it ends at so many tokens.
        is_active: whether it is decoded.
    """

    text: list[int]
    num_read: int
    drafts: list[int]
    parents: list[int]
    luck: list[int]
    limit: int
    is_active: bool

    def path(self, drafted: int) -> list[int]:
        """The accepted nodes, the root first, where so many drafts are verified."""
        nodes = [0]
        for pick in self.luck:
            children = [i + 1 for i in range(drafted) if self.parents[i] == nodes[-1]]
            if not children or pick < 0:
                break
            nodes.append(children[pick % len(children)])
        return nodes


@st.composite
def _line(draw: st.DrawFn, trees: bool) -> Line:
    text = draw(st.lists(st.integers(0, 49), min_size=1, max_size=CAPACITY - K - 2))
    drafts = draw(st.lists(st.integers(50, 98), max_size=K))
    return Line(
        text=text,
        num_read=draw(st.one_of(st.just(len(text) - 1), st.integers(0, len(text) - 1))),
        drafts=drafts,
        parents=[draw(st.integers(0, i)) if trees else i for i in range(len(drafts))],
        luck=draw(st.lists(st.integers(-1, 3), min_size=K, max_size=K)),
        limit=len(text) + draw(st.integers(1, K + 2)),
        is_active=draw(st.integers(0, 5)) > 0,
    )


def _padded(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _state(lines: list[Line], trees: bool) -> StepState:
    state = StepState.empty(
        PartSizes(len(lines), CAPACITY, VOCABULARY, K, max_depth=K if trees else None), torch.device("cpu")
    )
    draft = replace(
        state.draft,
        tokens=_padded([line.drafts for line in lines], K),
        lengths=torch.tensor([len(line.drafts) for line in lines]),
        parents=_padded([line.parents for line in lines], K) if trees else None,
    )
    return replace(
        state,
        history=_padded([line.text for line in lines], CAPACITY),
        known=torch.tensor([len(line.text) for line in lines]),
        lengths=torch.tensor([line.num_read for line in lines]),
        draft=draft,
        active=torch.tensor([line.is_active for line in lines]),
        limits=torch.tensor([line.limit for line in lines]),
    )


@settings(max_examples=300)
@given(data=st.data(), trees=st.booleans(), tokens=st.integers(1, 40))
def test_what_a_step_has_read_for_good(data, trees, tokens):
    lines = data.draw(st.lists(_line(trees), min_size=1, max_size=4), label="lines")
    before = _state(lines, trees)
    places = torch.arange(tokens)
    packed = pack(before.history, before.known, before.lengths, before.active, places, places, K + 1, before.draft)
    if trees:
        packed = as_trees(packed, before.lengths, 1, before.draft)
    drafted, fed, ready = packed.drafted.tolist(), packed.fed.tolist(), packed.ready.tolist()
    paths = [line.path(n) if is_ready else [0] for line, n, is_ready in zip(lines, drafted, ready, strict=True)]
    path = _padded(paths, K + 1)
    verdict = Verdict(
        torch.tensor([len(nodes) - 1 for nodes in paths]), torch.full((len(lines),), NEXT), path=path if trees else None
    )
    after, _ = commit(before, packed, verdict)
    read, source = newly_read(before, after, packed, path if trees else None)

    expected, counts = [], []
    for b, line in enumerate(lines):
        pending, start = len(line.text) - line.num_read, int(packed.offsets[b])
        entries = [(line.text[line.num_read + i], start + i) for i in range(min(fed[b], pending))]
        if ready[b]:
            kept = min(len(paths[b]) - 1, line.limit - len(line.text) - 1)
            entries += [(line.drafts[node - 1], start + pending - 1 + node) for node in paths[b][1 : kept + 1]]
        expected += [(token, line.num_read + i, b, place) for i, (token, place) in enumerate(entries)]
        counts.append(len(entries))
        assert after.history[b, line.num_read :][: len(entries)].tolist() == [token for token, _ in entries]
    found = torch.stack([read.input_ids, read.positions, read.row_ids, source], 1).tolist()
    assert [tuple(each) for each in found[: len(expected)]] == expected
    assert read.row_ids[len(expected) :].eq(len(lines)).all(), "what lies behind belongs to no row"
    assert ((source >= 0) & (source < tokens)).all()
    assert read.fed.tolist() == counts
    assert read.offsets.tolist() == [sum(counts[:b]) for b in range(len(lines) + 1)]
    assert read.roots.tolist() == [sum(counts[: b + 1]) - 1 if ready[b] else 0 for b in range(len(lines))]
