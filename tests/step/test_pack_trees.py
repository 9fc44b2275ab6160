"""`pack` and `as_trees` against a layout by hand: trees beside chains, prompts, and rows that do nothing."""

from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.ops._ancestors import WORD_BITS, unpack_ancestors
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.pack import Packed, as_trees, logit_rows, pack
from tests.step.forests import Forest, Tree, forests, nodes_of

K, D, CAPACITY = 6, 3, 120
WORDS = 1


@dataclass(frozen=True)
class _Batch:
    """Rows of a step: their known and committed tokens, and the trees that they would verify."""

    known: list[int]
    lengths: list[int]
    active: list[bool]
    forest: Forest
    tokens: int
    share: int = K + 1

    def pack(self, words: int = WORDS) -> Packed:
        """Token `t` of row `b` is `1000 * b + t`; those that are not known yet are rubbish."""
        known, lengths = torch.tensor(self.known), torch.tensor(self.lengths)
        place = torch.arange(CAPACITY)
        history = torch.where(place < known[:, None], 1000 * torch.arange(len(known))[:, None] + place, -1)
        sizes = torch.arange(self.tokens), torch.arange(CAPACITY)
        packed = pack(history, known, lengths, torch.tensor(self.active), *sizes, self.share, self.forest.nodes)
        return as_trees(packed, lengths, words, self.forest.nodes)


@dataclass(frozen=True)
class _Token:
    row: int
    token: int
    position: int
    slot: int
    sees: list[int]  # tokens of its row in this step


def _in_tree(row: int, known: int, tree: Tree, count: int) -> list[_Token]:
    """The root and the first drafts, `count` nodes."""
    tokens = [1000 * row + known - 1, *tree.tokens]
    return [
        _Token(row, tokens[node], known - 1 + tree.depth(node), known - 1 + node, sorted(tree.path(node)))
        for node in range(count)
    ]


def _laid_out(batch: _Batch, fed: list[int], words: int = WORDS) -> list[_Token]:
    """The tokens of all rows, if so many of each are fed."""
    tokens: list[_Token] = []
    for row, (known, length, tree) in enumerate(zip(batch.known, batch.lengths, batch.forest.trees, strict=True)):
        if known - length == 1:
            tokens += _in_tree(row, known, tree, fed[row])
        else:
            for index in range(fed[row]):
                sees = list(range(min(index + 1, words * WORD_BITS)))
                tokens.append(_Token(row, 1000 * row + length + index, length + index, length + index, sees))
    return tokens


def _check(batch: _Batch, packed: Packed, words: int = WORDS) -> None:
    fed = packed.fed.tolist()
    tokens = _laid_out(batch, fed, words)
    count = len(tokens)
    assert packed.slots is not None
    assert packed.ancestors is not None
    assert packed.ancestors.shape == (batch.tokens, words)
    assert packed.ancestors.dtype == torch.int32
    sees = [bits.nonzero().flatten().tolist() for bits in unpack_ancestors(packed.ancestors)[:count]]
    assert packed.row_ids.tolist() == [token.row for token in tokens] + [len(fed)] * (batch.tokens - count)
    assert packed.input_ids[:count].tolist() == [token.token for token in tokens]
    assert packed.positions[:count].tolist() == [token.position for token in tokens]
    assert packed.slots[:count].tolist() == [token.slot for token in tokens]
    assert sees == [token.sees for token in tokens]
    assert [int(first) for first in packed.offsets] == [sum(fed[:row]) for row in range(len(fed) + 1)]


@st.composite
def _batches(draw: st.DrawFn) -> _Batch:
    rows = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 12), min_size=rows, max_size=rows))
    pending = draw(st.lists(st.sampled_from([1, 1, 1, 2, 9, 50]), min_size=rows, max_size=rows))
    return _Batch(
        known=[length + count for length, count in zip(lengths, pending, strict=True)],
        lengths=lengths,
        active=draw(st.lists(st.sampled_from([True, True, True, False]), min_size=rows, max_size=rows)),
        forest=draw(forests(rows, K, D)),
        tokens=draw(st.integers(1, 70)),
        share=draw(st.integers(1, K + 1)),
    )


@given(_batches())
@settings(max_examples=200)
def test_every_token_is_where_a_layout_by_hand_puts_it(batch):
    packed = batch.pack()
    _check(batch, packed)
    fed = packed.fed.tolist()
    for row, tree in enumerate(batch.forest.trees):
        pending = batch.known[row] - batch.lengths[row]
        wanted = pending + (len(tree.parents) if pending == 1 else 0)
        assert fed[row] <= (wanted if batch.active[row] else 0)
        assert bool(packed.ready[row]) == (batch.active[row] and fed[row] >= pending)
        assert packed.drafted[row] == (fed[row] - pending if packed.ready[row] else 0)


@given(_batches())
@settings(max_examples=100)
def test_logits_are_of_nodes_and_predict_what_is_one_deeper(batch):
    packed = batch.pack()
    expected = [
        (row, int(packed.offsets[row]) + last + node, batch.known[row] + tree.depth(node))
        for row, tree in enumerate(batch.forest.trees)
        if packed.ready[row]
        for last in [batch.known[row] - batch.lengths[row] - 1]
        for node in range(int(packed.drafted[row]) + 1)
    ]
    rows = logit_rows(packed, torch.tensor(batch.known), torch.arange(len(expected) + 2))
    found = zip(rows.row_ids.tolist(), rows.index.tolist(), rows.positions.tolist(), strict=True)
    assert [*found] == [*expected, *[(len(batch.known) - 1, 0, 0)] * 2]


TREE = Tree([0, 0, 1, 2, 2, 4], [1, 2, 1, 0, 2, 1])
"""0 with the children 1 and 2; 3 follows 1; 4 and 5 follow 2; 6 follows 4."""


def test_a_tree_beside_a_chain_and_a_prompt_longer_than_the_bits():
    chain = Tree([0, 1, 2], [2, 1, 0])
    forest = Forest([TREE, chain, Tree([], [])], nodes_of([TREE, chain, Tree([], [])], K, D))
    batch = _Batch([5, 9, 71], [4, 8, 1], [True] * 3, forest, tokens=90)
    packed = batch.pack()
    _check(batch, packed)
    assert packed.fed.tolist() == [7, 4, 70]
    assert packed.positions[:7].tolist() == [4, 5, 5, 6, 6, 6, 7], "siblings share positions"
    assert packed.slots is not None
    assert packed.slots[:7].tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert packed.ancestors is not None
    assert packed.ancestors[:7, 0].tolist() == [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b100101, 0b1010101]
    assert packed.ancestors[7:11, 0].tolist() == [0b1, 0b11, 0b111, 0b1111]
    assert packed.ancestors[80, 0] == -1, "all that have a bit"


def test_more_words_than_a_tree_needs():
    forest = Forest([TREE, Tree([], [])], nodes_of([TREE, Tree([], [])], K, D))
    batch = _Batch([5, 71], [4, 1], [True] * 2, forest, tokens=90)
    _check(batch, batch.pack(words=2), words=2)


def test_a_tree_is_cut_to_its_first_drafts():
    """Their parents are before them, so it is one still."""
    forest = Forest([TREE, TREE], nodes_of([TREE, TREE], K, D))
    batch = _Batch([5, 6], [4, 5], [True] * 2, forest, tokens=9)
    packed = batch.pack()
    _check(batch, packed)
    assert packed.fed.tolist() == [7, 2]
    assert packed.drafted.tolist() == [6, 1]


def test_a_row_with_more_to_read_than_its_root_verifies_no_tree():
    forest = Forest([TREE], nodes_of([TREE], K, D))
    packed = _Batch([5], [3], [True], forest, tokens=9).pack()
    assert (packed.fed.tolist(), packed.drafted.tolist(), packed.ready.tolist()) == ([2], [0], [True])


@given(_batches(), st.integers(1, 2))
def test_chains_given_to_a_model_of_trees_see_what_is_before_them(batch, words):
    """What a draft model for trees is fed, and a step without drafts."""
    chains = replace(batch.forest.nodes, parents=None)
    for draft in (chains, None):
        known, lengths = torch.tensor(batch.known), torch.tensor(batch.lengths)
        sizes = torch.arange(batch.tokens), torch.arange(CAPACITY)
        history = torch.zeros((len(known), CAPACITY), dtype=torch.int64)
        plain = pack(history, known, lengths, torch.tensor(batch.active), *sizes, K + 1, chains)
        packed = as_trees(plain, lengths, words, draft)
        assert packed.slots is not None
        assert packed.ancestors is not None
        assert torch.equal(packed.positions, plain.positions)
        assert torch.equal(packed.slots, plain.positions)
        assert packed.depths is None
        bits = unpack_ancestors(packed.ancestors)
        for token in range(int(plain.fed.sum())):
            index = int(plain.positions[token]) - batch.lengths[int(plain.row_ids[token])]
            assert bits[token].nonzero().flatten().tolist() == list(range(min(index + 1, words * WORD_BITS)))


def test_a_draft_that_is_a_chain_may_be_given_as_a_tree():
    """It is laid out alike."""
    tree = Tree([0, 1, 2, 3], [2, 1, 0, 1])
    nodes = nodes_of([tree], 4, 4)
    known, lengths, sizes = torch.tensor([5]), torch.tensor([4]), (torch.arange(6), torch.arange(CAPACITY))
    history = torch.arange(CAPACITY)[None]
    packed = [
        as_trees(pack(history, known, lengths, torch.tensor([True]), *sizes, 5, draft), lengths, WORDS, draft)
        for draft in (nodes, Nodes(nodes.tokens, nodes.lengths, nodes.grades, None, 4))
    ]
    for name in ("input_ids", "positions", "slots", "offsets", "drafted", "roots"):
        assert torch.equal(getattr(packed[0], name), getattr(packed[1], name)), name
    live = packed[0].row_ids == 0
    for one in packed:
        assert one.ancestors is not None
        assert one.ancestors[live, 0].tolist() == [0b1, 0b11, 0b111, 0b1111, 0b11111]
