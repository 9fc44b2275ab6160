"""`DynamicTree`: sizes that make sense, and trees whose drafts never come without their parents."""

import pytest
import torch

from emssd_compile.drafters.dynamic_tree import Beam, DynamicTree, GrowingTree
from emssd_compile.errors import OptionError


def _grown(shape: DynamicTree, levels: list[list[list[float]]], max_drafts: int = 9) -> GrowingTree:
    """The tree of one row whose drafts have these log-probabilities; the token is the draft's number."""
    tree = GrowingTree(shape, torch.tensor([max_drafts]), Beam.of_roots(torch.tensor([0]), shape.fed))
    first = 1
    for level in levels:
        log_q = torch.tensor(level)
        tree.grow(first + torch.arange(log_q.numel()).view_as(log_q), log_q)
        first += log_q.numel()
    return tree


LEVELS = [[[-0.5, -1.0]], [[-3.0, -4.0], [-0.25, -0.5]], [[-0.25, -9.0], [-1.0, -1.0]]]
"""Drafts 1 and 2 behind the root; 3 and 4 behind 1, 5 and 6 behind 2; 7 and 8 behind 5, 9 and 10 behind 6."""


def test_the_best_of_all_drafts_are_kept_with_parents_before_children():
    tree = _grown(DynamicTree(5, 3, 2), LEVELS)
    kept = tree.kept()
    assert kept.tokens.tolist() == [[1, 2, 5, 6, 7]]
    assert kept.parents.tolist() == [[0, 0, 2, 2, 3]]
    assert kept.lengths.tolist() == [5]
    torch.testing.assert_close(kept.probabilities, torch.tensor([[-0.5, -1.0, -0.25, -0.5, -0.25]]).exp())


def test_a_node_sees_those_that_it_descends_from():
    """The beam behind drafts 1 and 2 is 5 and 6, both children of 2."""
    tree = _grown(DynamicTree(5, 3, 2), LEVELS[:2])
    assert tree.beam.numbers.tolist() == [[5, 6]]
    assert tree.beam.origins.tolist() == [[1, 1]]
    assert tree.beam.sees.tolist() == [[[False, True, True, False], [False, True, False, True]]]


def test_of_equals_the_parent_comes_first():
    """A child that is certain is as likely as its parent."""
    kept = _grown(DynamicTree(3, 2, 2), [[[-1.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]]).kept()
    assert (kept.tokens.tolist(), kept.parents.tolist()) == ([[1, 2, 3]], [[0, 0, 1]])


def test_a_row_that_ends_soon_drafts_no_deeper():
    kept = _grown(DynamicTree(5, 3, 2), LEVELS, max_drafts=1).kept()
    assert kept.lengths.tolist() == [2]
    assert kept.tokens[0, :2].tolist() == [1, 2]


def test_what_cannot_come_is_not_drafted():
    """As top-k leaves it: impossible drafts lie between others, and are behind them all then."""
    impossible = -torch.inf
    kept = _grown(DynamicTree(5, 2, 2), [[[-0.5, impossible]], [[-1.0, -2.0], [-1.0, -1.0]]]).kept()
    assert kept.lengths.tolist() == [3]
    assert (kept.tokens[0, :3].tolist(), kept.parents[0, :3].tolist()) == ([1, 3, 4], [0, 1, 1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "DynamicTree nodes=0 is out of range"),
        ((4, 0, 1), "DynamicTree depth=0"),
        ((4, 1, True), "DynamicTree width=True is a bool"),
        ((5, 1, 4), "nodes=5 does not go with depth=1 and width=4; pass at most 4 nodes"),
        ((6, 3, 4), "pass at least 7 nodes"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(sizes, message):
    with pytest.raises(OptionError, match=message):
        DynamicTree(*sizes)
