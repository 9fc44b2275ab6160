"""`SparseTree`: nodes breadth first, trees that make no sense refused, and the best tree for measured accuracies."""

from itertools import combinations, product
from math import prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from emssd_compile.drafters.sparse_tree import SparseTree, calibrated_tree
from emssd_compile.drafters.tree_shape import MOST_NODES, TreeShape
from emssd_compile.errors import OptionError

CPU = torch.device("cpu")


def test_nodes_are_numbered_breadth_first_whatever_the_order_they_are_given_in():
    tree = SparseTree.of("tree", [(2, 0), [0, 1], (0,), (0, 1, 3), (2,), (0, 0), (1,)])
    assert tree.paths == ((0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 3))
    assert tree.parents == (0, 0, 0, 1, 1, 3, 5)
    assert tree.depths == (1, 1, 1, 2, 2, 2, 3)
    assert tree.ranks == (0, 1, 2, 0, 1, 0, 3)
    assert (tree.depth, tree.num_nodes, tree.widths) == (3, 7, (3, 2, 4))


@pytest.mark.parametrize("branching", [(3,), (1, 1, 1), (3, 1, 2), (2, 2)])
def test_a_branching_is_the_same_tree_as_a_tree_shape(branching):
    tree, shape = SparseTree.of("tree", branching), TreeShape.of("tree", branching)
    assert tree.parents == tuple(shape.parents(CPU).tolist())
    assert tree.depths == tuple(shape.depths(CPU).tolist())
    assert tree.widths == branching


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (4, r"tree=4 is no tree; pass paths"),
        ("0", r"tree='0' is no tree"),
        ((), r"tree=\(\) has 0 drafts; use 1 to 512"),
        ((2, 0), r"tree\[1\]=0 is out of range"),
        (((0,), ()), r"tree\[1\] is empty: the root is no draft"),
        (((0,), 1), r"tree\[1\]=1 is no path of ranks"),
        (((0,), (0, -1)), r"tree\[1\]\[1\]=-1 is out of range; pass at least 0"),
        (((0,), (0, 1.5)), r"tree\[1\]\[1\]=1.5 is not an integer"),
        (((0,), (1, 0)), r"tree has \(1, 0\) without its parent \(1,\)"),
        (((0,), (1,), [0]), r"tree has \(0,\) twice"),
        ([(rank,) for rank in range(MOST_NODES + 1)], r"tree has 513 drafts; use 1 to 512"),
        ((2,) * 9, r"has 1022 drafts; use 1 to 512"),
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(tree, message):
    with pytest.raises(OptionError, match=message):
        SparseTree.of("tree", tree)


def _expected_length(paths, accuracies):
    return sum(prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in paths)


def _best_by_trial(accuracies, count):
    """The most that any tree of `count` nodes can be expected to have accepted."""
    ranks = range(len(accuracies[0]))
    nodes = [path for depth in range(1, len(accuracies) + 1) for path in product(ranks, repeat=depth)]
    trees = (set(tree) for tree in combinations(nodes, count))
    closed = (tree for tree in trees if all(len(path) == 1 or path[:-1] in tree for path in tree))
    return max(_expected_length(tree, accuracies) for tree in closed)


@pytest.mark.parametrize(
    "accuracies",
    [
        [[0.6, 0.2], [0.5, 0.1], [0.4, 0.3]],
        [[0.2, 0.5], [0.9, 0.1], [0.3, 0.7]],  # ranks that are not the likeliest first
        [[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]],  # ties of children with their parents
    ],
)
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_no_tree_of_as_many_nodes_is_expected_to_be_better(accuracies, count):
    tree = calibrated_tree(accuracies, count)
    assert tree.num_nodes == count
    assert _expected_length(tree.paths, accuracies) == pytest.approx(_best_by_trial(accuracies, count))


@given(
    st.integers(1, 3).flatmap(
        lambda ranks: st.lists(st.lists(st.integers(0, 10), min_size=ranks, max_size=ranks), min_size=1, max_size=2)
    ),
    st.integers(1, 4),
)
def test_whatever_is_measured_the_tree_is_the_best_of_its_size(tenths, count):
    accuracies = [[share / 10 for share in row] for row in tenths]
    assume(any(accuracies[0]))
    number = sum(len(accuracies[0]) ** depth for depth in range(1, len(accuracies) + 1))
    paths = calibrated_tree(accuracies, count).paths
    assert len(paths) <= count
    best = _best_by_trial(accuracies, min(count, number))
    assert _expected_length(paths, accuracies) == pytest.approx(best)


def test_the_example_of_the_docstring():
    assert calibrated_tree([[0.6, 0.2], [0.5, 0.1]], 3).paths == ((0,), (1,), (0, 0))


def test_nodes_that_are_never_right_are_left_out():
    assert calibrated_tree(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 9).paths == ((0,), (0, 0), (0, 1))


@pytest.mark.parametrize(
    ("accuracies", "nodes", "message"),
    [
        ([[0.5, 1.5]], 3, r"accuracies\[0\]\[1\]=1.5 is out of range; pass 0 to 1"),
        ([[0.5], [float("nan")]], 3, r"accuracies\[1\]\[0\]=nan is not a number"),
        ([0.5], 3, r"accuracies\[0\]=0.5 is no sequence"),
        ([[0.0, 0.0]], 3, r"accuracies: no token is ever right at depth 1"),
        ([], 3, r"accuracies: no token is ever right at depth 1"),
        ([[0.5]], 0, r"num_nodes=0 is out of range"),
        ([[0.5]], MOST_NODES + 1, r"num_nodes=513 is out of range; pass at most 512"),
    ],
)
def test_accuracies_that_make_no_sense_are_refused(accuracies, nodes, message):
    with pytest.raises(OptionError, match=message):
        calibrated_tree(accuracies, nodes)
