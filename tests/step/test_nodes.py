"""Trees of drafts against plain loops, whatever lies behind the drafts that there are."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.step.nodes import Lineage, Nodes, of_parents, select
from tests.step.forests import Forest, Tree, forests, masks

ROWS, K, D = 3, 6, 4
FOREST = forests(ROWS, K, D)
MASK = masks(ROWS, K)


def _closed(forest: Forest, drafts: Tensor) -> list[list[bool]]:
    """Which drafts of each row are chosen with all that they follow."""
    return [
        [all(chosen[node - 1] for node in tree.path(i + 1)[1:]) for i in range(len(tree.parents))]
        for tree, chosen in zip(forest.trees, drafts.tolist(), strict=True)
    ]


def _padded(rows: list[list[bool]]) -> Tensor:
    return torch.tensor([[*row, *[False] * (K - len(row))] for row in rows])


@given(FOREST)
@settings(max_examples=150)
def test_lineage_is_that_of_a_walk_to_the_root(forest):
    assert forest.nodes.parents is not None
    lineage = Lineage.of(forest.nodes.parents, D)
    for row, tree in enumerate(forest.trees):
        for node in range(len(tree.parents) + 1):
            assert lineage.depths[row, node] == tree.depth(node)
            assert lineage.descends[row, node].nonzero().flatten().tolist() == sorted(tree.path(node))


@given(FOREST, st.integers(0, D))
def test_what_is_deeper_than_asked_for_is_found_to_be_as_deep_as_that(forest, limit):
    assert forest.nodes.parents is not None
    depths = Lineage.of(forest.nodes.parents, limit).depths.tolist()
    for row, tree in enumerate(forest.trees):
        for node in range(len(tree.parents) + 1):
            assert depths[row][node] == min(tree.depth(node), limit)


@given(FOREST, MASK)
@settings(max_examples=150)
def test_closed_leaves_out_whatever_follows_one_that_is_left_out(forest, drafts):
    assert forest.nodes.parents is not None
    closed = Lineage.of(forest.nodes.parents, D).closed(drafts)
    for row, expected in enumerate(_closed(forest, drafts)):
        assert closed[row, : len(expected)].tolist() == expected


@given(FOREST)
def test_of_parents_is_what_belongs_to_the_parent(forest):
    assert forest.nodes.parents is not None
    values = torch.arange(ROWS * K).view(ROWS, K)
    found = of_parents(values, forest.nodes.parents, root=-1).tolist()
    for row, tree in enumerate(forest.trees):
        expected = [-1 if parent == 0 else row * K + parent - 1 for parent in tree.parents]
        assert found[row][: len(expected)] == expected


def _renumbered(tree: Tree, kept: list[bool]) -> Tree:
    old = [0, *(i + 1 for i, keep in enumerate(kept) if keep)]
    parents = [old.index(tree.parents[node - 1]) for node in old[1:]]
    return Tree(parents, [tree.tokens[node - 1] for node in old[1:]])


@given(FOREST, MASK)
@settings(max_examples=200)
def test_select_keeps_trees_as_they_are_and_numbers_them_anew(forest, drafts):
    kept = _closed(forest, drafts)
    chosen = select(forest.nodes, _padded(kept))
    assert chosen.parents is not None
    for row, tree in enumerate(forest.trees):
        expected, length = _renumbered(tree, kept[row]), sum(kept[row])
        assert chosen.lengths[row] == length
        assert chosen.tokens[row, :length].tolist() == expected.tokens
        assert chosen.parents[row, :length].tolist() == expected.parents
        assert chosen.grades[row, :length].tolist() == [i for i, keep in enumerate(kept[row]) if keep]
    assert 0 <= int(chosen.parents.min()) <= int(chosen.parents.max()) <= K, "what lies behind them may be looked up"
    assert chosen.max_depth == D


@given(FOREST, MASK)
@settings(max_examples=100)
def test_what_drafts_were_drawn_from_goes_with_the_node_that_they_follow(forest, drafts):
    """Line n of the proposal holds n: a node is known by it after it was numbered anew."""
    kept = _closed(forest, drafts)
    lines = torch.arange(K + 1).float()[:, None].expand(ROWS, K + 1, 2)
    chosen = select(replace(forest.nodes, proposal=lines), _padded(kept))
    assert chosen.proposal is not None
    for row, own in enumerate(kept):
        expected = [0, *(i + 1 for i, keep in enumerate(own) if keep)]
        assert chosen.proposal[row, : len(expected), 1].tolist() == expected


def test_of_chains_the_first_are_kept():
    tokens = torch.arange(8).view(2, 4)
    nodes = Nodes(tokens, torch.tensor([4, 2]), tokens, None, 4)
    assert nodes.exist.tolist() == [[True] * 4, [True, True, False, False]]
    chosen = select(nodes, torch.tensor([[True, True, False, False], [False] * 4]))
    assert chosen.lengths.tolist() == [2, 0]
    assert torch.equal(chosen.tokens, tokens)
