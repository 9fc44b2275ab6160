"""What a length policy is shown of trees, and what becomes of its ranks: against plain walks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.step.nodes import Nodes
from emssd_compile.step.policy import Ranking, fit, outcome, proposed_drafts
from tests.step.forests import Forest, Tree, closed_masks, forests, masks, nodes_of

ROWS, K, D = 3, 6, 4
FOREST = forests(ROWS, K, D)
MASK = masks(ROWS, K)
ANY = st.integers(-3, K + 3)


def _is_closed(forest: Forest, kept: Tensor) -> bool:
    return all(
        bool(kept[row, node - 1])
        for row, tree in enumerate(forest.trees)
        for i in range(len(tree.parents))
        if kept[row, i]
        for node in tree.path(i + 1)[1:]
    )


@given(FOREST, st.data(), st.lists(ANY, min_size=ROWS * K, max_size=ROWS * K), st.integers(-2, ROWS * K + 2))
@settings(max_examples=300)
def test_whatever_the_ranks_what_is_kept_are_trees_and_no_more_than_there_is_room_for(forest, data, ranks, room):
    proposed = data.draw(closed_masks(forest))
    ranking = Ranking(torch.tensor(ranks).view(ROWS, K), torch.tensor(0))
    kept = fit(ranking, forest.nodes, proposed, torch.tensor(room))
    assert kept.dtype == torch.bool
    assert not (kept & ~proposed).any()
    assert int(kept.sum()) <= max(room, 0)
    assert _is_closed(forest, kept)


@given(FOREST, st.data(), st.lists(ANY, min_size=ROWS * K, max_size=ROWS * K), st.integers(-2, ROWS * K + 2))
@settings(max_examples=200)
def test_in_order_of_siblings_the_first_are_kept_whatever_the_ranks(forest, data, ranks, room):
    ranking = Ranking(torch.tensor(ranks).view(ROWS, K), torch.tensor(0))
    kept = fit(ranking, forest.nodes, data.draw(closed_masks(forest)), torch.tensor(room), in_order=True)
    assert _is_closed(forest, kept)
    for row, tree in enumerate(forest.trees):
        for draft, parent in enumerate(tree.parents):
            earlier = [child - 1 for child in tree.children(parent) if child - 1 < draft]
            assert not kept[row, draft] or all(bool(kept[row, sibling]) for sibling in earlier)


@given(FOREST, st.data())
@settings(max_examples=200)
def test_of_right_ranks_the_first_are_kept(forest, data):
    proposed = data.draw(closed_masks(forest))
    left = [(row, i) for row in range(ROWS) for i in range(K) if proposed[row, i]]
    order: list[tuple[int, int]] = []
    while left:  # those whose parent has its place
        parents = [forest.trees[row].parents[i] for row, i in left]
        free = [at for at, parent in zip(left, parents, strict=True) if parent == 0 or (at[0], parent - 1) in order]
        order.append(data.draw(st.sampled_from(free)))
        left.remove(order[-1])
    room = data.draw(st.integers(0, len(order) + 1))
    ranks = torch.full((ROWS, K), data.draw(ANY))  # what is not proposed may stand anywhere
    for place, at in enumerate(order):
        ranks[at] = place
    kept = fit(Ranking(ranks, torch.tensor(0)), forest.nodes, proposed, torch.tensor(room))
    assert {(row, i) for row, i in kept.nonzero().tolist()} == {*order[:room]}


@given(FOREST, st.data())
@settings(max_examples=150)
def test_outcome_is_which_nodes_were_accepted_and_which_followed_these(forest, data):
    ends = [data.draw(st.integers(0, len(tree.parents))) for tree in forest.trees]
    paths = [tree.path(end) for tree, end in zip(forest.trees, ends, strict=True)]
    rubbish = data.draw(st.lists(ANY, min_size=D, max_size=D))
    padded = [[*path, *rubbish[len(path) - 1 :]] for path in paths]
    counts = torch.tensor([len(path) - 1 for path in paths])
    tried, accepted = outcome(forest.nodes, torch.tensor(padded), counts)
    for row, (tree, path) in enumerate(zip(forest.trees, paths, strict=True)):
        assert [i + 1 for i in range(K) if accepted[row, i]] == sorted(path[1:])
        assert [i + 1 for i in range(K) if tried[row, i]] == sorted({n for node in path for n in tree.children(node)})


@given(st.lists(st.tuples(st.integers(0, K), st.integers(0, K)), min_size=1, max_size=4))
def test_of_a_chain_the_draft_behind_the_accepted_ones_was_tried_and_none_behind_that(rows):
    lengths, accepted = zip(*((max(pair), min(pair)) for pair in rows), strict=True)
    shape = (len(rows), K)
    nodes = Nodes(torch.zeros(shape, dtype=torch.int64), torch.tensor(lengths), torch.zeros(shape), None, K)
    tried, kept = outcome(nodes, None, torch.tensor(accepted))
    assert kept.sum(1).tolist() == [*accepted]
    assert tried.sum(1).tolist() == [min(a + 1, n) for a, n in zip(accepted, lengths, strict=True)]
    assert not (kept[:, 1:] & ~kept[:, :-1]).any()
    assert not (tried[:, 1:] & ~kept[:, :-1]).any()


@given(forests(ROWS, K, K), MASK, st.lists(st.integers(0, D), min_size=ROWS, max_size=ROWS))
@settings(max_examples=200)
def test_what_is_too_deep_or_no_token_is_left_out_with_all_that_follows_it(forest, is_token, max_drafts):
    """Also where the drafter goes deeper than it said."""
    nodes = nodes_of(forest.trees, K, D)
    proposed = proposed_drafts(nodes, is_token, torch.tensor(max_drafts))
    for row, tree in enumerate(forest.trees):
        expected = [
            tree.depth(i + 1) <= max_drafts[row] and all(bool(is_token[row, n - 1]) for n in tree.path(i + 1)[1:])
            for i in range(len(tree.parents))
        ]
        assert proposed[row].tolist() == [*expected, *[False] * (K - len(expected))]


def test_what_is_left_out_takes_along_what_follows_it_and_nothing_else():
    tree = Tree([0, 0, 1, 2, 4, 3], [0] * 6)
    nodes = nodes_of([tree] * 4, K, D)
    is_token = torch.ones(4, K, dtype=torch.bool)
    is_token[1, 0] = False
    proposed = proposed_drafts(nodes, is_token, torch.tensor([D, D, 2, 0]))
    found = [[i + 1 for i in range(K) if row[i]] for row in proposed.tolist()]
    assert found == [[1, 2, 3, 4, 5, 6], [2, 4, 5], [1, 2, 3, 4], []]


@given(st.lists(st.tuples(st.integers(-2, K + 3), st.integers(0, K)), min_size=ROWS, max_size=ROWS), MASK)
def test_of_a_chain_what_is_no_token_ends_it(rows, is_token):
    lengths, max_drafts = (torch.tensor(column) for column in zip(*rows, strict=True))
    nodes = Nodes(torch.zeros((ROWS, K), dtype=torch.int64), lengths, torch.zeros((ROWS, K)), None, K)
    proposed = proposed_drafts(nodes, is_token, max_drafts).tolist()
    for row in range(ROWS):
        leading = [*is_token[row].tolist(), False].index(False)
        expected = max(0, min(leading, int(lengths[row]), int(max_drafts[row])))
        assert proposed[row] == [i < expected for i in range(K)]


def test_a_tree_deeper_than_it_may_be_is_cut_at_that_depth():
    nodes = nodes_of([Tree([0, 1, 2, 3, 4, 5], [0] * 6)], K, D)
    proposed = proposed_drafts(nodes, torch.ones(1, K, dtype=torch.bool), torch.tensor([D]))
    assert proposed.tolist() == [[True] * D + [False] * (K - D)]
