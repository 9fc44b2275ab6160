"""Beams become a tree in which no token stands twice behind the same path."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from emssd_compile.drafters.beams import prefix_tree

Beams = list[list[int]]


@st.composite
def _rows(draw: st.DrawFn) -> tuple[list[Beams], list[list[bool]]]:
    """The beams of some rows, of few tokens so that they have much in common; and which of them there are."""
    rows, width, depth = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    beam = st.lists(st.integers(0, 2), min_size=depth, max_size=depth)
    beams = st.lists(beam, min_size=width, max_size=width)
    exist = st.lists(st.booleans(), min_size=width, max_size=width)
    return draw(st.lists(beams, min_size=rows, max_size=rows)), draw(st.lists(exist, min_size=rows, max_size=rows))


def _grade(path: Sequence[int]) -> int:
    """One that belongs to a path."""
    return hash(tuple(path)) % 1000


@given(_rows())
def test_the_tree_is_the_trie_of_the_beams(given_rows):
    """Breadth first, so parents come before their children; each path once, so no siblings are alike."""
    rows, exist = given_rows
    grades = [[[_grade(beam[: k + 1]) for k in range(len(beam))] for beam in beams] for beams in rows]
    nodes = prefix_tree(torch.tensor(rows), torch.tensor(grades), torch.tensor(exist))
    assert nodes.parents is not None
    assert nodes.tokens.shape == nodes.parents.shape == (len(rows), len(rows[0]) * len(rows[0][0]))
    for row, (beams, there) in enumerate(zip(rows, exist, strict=True)):
        count = int(nodes.lengths[row])
        fields = (field[row, :count].tolist() for field in (nodes.tokens, nodes.parents, nodes.grades))
        paths: list[tuple[int, ...]] = [()]
        for token, parent, grade in zip(*fields, strict=True):
            paths.append((*paths[parent], token))  # fails if the parent comes later
            assert grade == _grade(paths[-1])
        trie = {
            tuple(beam[:k])
            for beam, is_there in zip(beams, there, strict=True)
            if is_there
            for k in range(1, len(beam) + 1)
        }
        assert sorted(paths[1:]) == sorted(trie)
        assert [len(path) for path in paths] == sorted(len(path) for path in paths)


def test_the_example_of_the_docstring():
    beams = torch.tensor([[[5, 3, 1], [5, 3, 2], [7, 3, 1]]])
    nodes = prefix_tree(beams, torch.zeros_like(beams), torch.ones(1, 3, dtype=torch.bool))
    assert nodes.parents is not None
    assert nodes.lengths.tolist() == [7]
    assert nodes.tokens[0, :7].tolist() == [5, 7, 3, 3, 1, 2, 1]
    assert nodes.parents[0, :7].tolist() == [0, 0, 1, 2, 3, 3, 4]
