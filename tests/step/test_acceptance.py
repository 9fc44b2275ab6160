"""What a tree accepts, against a walk from the root down; and what a verdict may mean at most."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.step.acceptance import Verdict, feasible, first_accepted
from emssd_compile.step.nodes import Nodes
from tests.step.forests import Tree, forests, nodes_of

ROWS, K, D = 3, 6, 4
FOREST = forests(ROWS, K, D)
WANTED = st.lists(st.integers(0, 2), min_size=ROWS * (K + 1), max_size=ROWS * (K + 1))


@given(FOREST, WANTED)
@settings(max_examples=200)
def test_of_a_tree_the_path_that_the_target_goes_is_accepted(forest, wanted):
    """Of siblings with the same token, the first."""
    choices = torch.tensor(wanted).view(ROWS, K + 1)
    verdict = first_accepted(forest.nodes, choices)
    assert verdict.path is not None
    assert verdict.path.shape == (ROWS, D + 1)
    assert torch.equal(feasible(forest.nodes, verdict), verdict.accept_lengths), "it can be carried out as it is"
    for row, tree in enumerate(forest.trees):
        own = choices[row].tolist()
        path = tree.walk(own)
        assert verdict.path[row, : len(path)].tolist() == path
        assert verdict.accept_lengths[row] == len(path) - 1
        assert verdict.next_tokens[row] == own[path[-1]]


@given(st.data())
def test_a_chain_given_as_a_tree_accepts_what_the_chain_does(data):
    lengths = data.draw(st.lists(st.integers(0, K), min_size=ROWS, max_size=ROWS))
    tokens = torch.tensor(data.draw(WANTED)).view(ROWS, K + 1)[:, :K]
    wanted = torch.tensor(data.draw(WANTED)).view(ROWS, K + 1)
    chain = Nodes(tokens, torch.tensor(lengths), tokens, None, K)
    tree = replace(chain, parents=torch.arange(K).expand(ROWS, K))
    as_chain, as_tree = first_accepted(chain, wanted), first_accepted(tree, wanted)
    assert as_chain.path is None
    assert torch.equal(as_chain.accept_lengths, as_tree.accept_lengths)
    assert torch.equal(as_chain.next_tokens, as_tree.next_tokens)


ANY = st.one_of(st.integers(-3, K + 3), st.sampled_from([-(10**12), 10**12]))


@given(FOREST, st.data())
@settings(max_examples=200)
def test_of_rubbish_so_much_is_feasible_as_is_a_path(forest, data):
    paths = [[data.draw(ANY), *data.draw(_nearly_a_path(tree))] for tree in forest.trees]
    accept_lengths = data.draw(st.lists(ANY, min_size=ROWS, max_size=ROWS))
    verdict = Verdict(torch.tensor(accept_lengths), torch.zeros(ROWS, dtype=torch.int64), path=torch.tensor(paths))
    expected = []
    for tree, (_, *nodes), claimed in zip(forest.trees, paths, accept_lengths, strict=True):
        length, before = 0, 0
        while length < D and nodes[length] in tree.children(before):
            before, length = nodes[length], length + 1
        expected.append(max(0, min(claimed, length)))
    assert feasible(forest.nodes, verdict).tolist() == expected


@st.composite
def _nearly_a_path(draw: st.DrawFn, tree: Tree) -> list[int]:
    """A path of the tree, then anything."""
    path = tree.path(draw(st.integers(0, len(tree.parents))))[1:]
    rest = D - draw(st.integers(0, len(path)))
    return [*path[: D - rest], *draw(st.lists(ANY, min_size=rest, max_size=rest))]


@given(st.lists(st.integers(0, K), min_size=ROWS, max_size=ROWS), st.lists(ANY, min_size=ROWS, max_size=ROWS))
def test_of_a_chain_no_more_is_feasible_than_there_is(lengths, accept_lengths):
    nodes = nodes_of([Tree([0] * length, [0] * length) for length in lengths], K, K)
    verdict = Verdict(torch.tensor(accept_lengths), torch.zeros(ROWS, dtype=torch.int64))
    found = feasible(replace(nodes, parents=None), verdict)
    assert found.tolist() == [max(0, min(pair)) for pair in zip(lengths, accept_lengths, strict=True)]
