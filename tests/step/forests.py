"""Random trees of drafts, as plain lists and as tensors, for tests that walk them one node at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.step.nodes import Nodes


@dataclass(frozen=True)
class Tree:
    """The drafts of one row: draft `i` is node `i + 1`, and node 0 is the root.

    Attributes:
        parents: the node that each draft follows.
        tokens: of each draft.
    """

    parents: list[int]
    tokens: list[int]

    def path(self, node: int) -> list[int]:
        """The nodes from the root down to a node, both included."""
        return [0] if node == 0 else [*self.path(self.parents[node - 1]), node]

    def depth(self, node: int) -> int:
        """Edges between a node and the root."""
        return len(self.path(node)) - 1

    def children(self, node: int) -> list[int]:
        """The nodes that follow a node, in order."""
        return [i + 1 for i, parent in enumerate(self.parents) if parent == node]

    def walk(self, wanted: list[int]) -> list[int]:
        """The path on which each draft is the first whose token is wanted behind its parent, from the root down."""
        path = [0]
        while True:
            right = [child for child in self.children(path[-1]) if self.tokens[child - 1] == wanted[path[-1]]]
            if not right:
                return path
            path.append(right[0])


@dataclass(frozen=True)
class Forest:
    """The trees of all rows, twice.

    Attributes:
        trees: as lists.
        nodes: as tensors, with rubbish behind the drafts of each row.
    """

    trees: list[Tree]
    nodes: Nodes


@st.composite
def trees(draw: st.DrawFn, num_drafts: int, max_depth: int, num_tokens: int = 3, full: bool = False) -> Tree:
    """Up to `num_drafts` drafts on paths of up to `max_depth`; siblings may have the same token."""
    length = num_drafts if full else draw(st.integers(0, num_drafts))
    depths, parents = [0], []
    for _ in range(length):
        parents.append(draw(st.sampled_from([node for node, depth in enumerate(depths) if depth < max_depth])))
        depths.append(depths[parents[-1]] + 1)
    return Tree(parents, draw(st.lists(st.integers(0, num_tokens - 1), min_size=length, max_size=length)))


@st.composite
def forests(
    draw: st.DrawFn, rows: int, num_drafts: int, max_depth: int, num_tokens: int = 3, full: bool = False
) -> Forest:
    """A tree in each row, and what earlier trees may have left behind it: nodes that follow any others."""
    found = draw(st.lists(trees(num_drafts, max_depth, num_tokens, full), min_size=rows, max_size=rows))
    count = rows * num_drafts
    parents = draw(st.lists(st.integers(0, num_drafts), min_size=count, max_size=count))
    tokens = draw(st.lists(st.integers(0, num_tokens - 1), min_size=count, max_size=count))
    return Forest(found, nodes_of(found, num_drafts, max_depth, parents, tokens))


def masks(rows: int, num_drafts: int) -> st.SearchStrategy[Tensor]:
    """Bool `[rows, num_drafts]`."""
    count = rows * num_drafts
    return st.lists(st.booleans(), min_size=count, max_size=count).map(lambda m: torch.tensor(m).view(rows, num_drafts))


@st.composite
def closed_masks(draw: st.DrawFn, forest: Forest) -> Tensor:
    """Some of the drafts, bool `[B, K]`, each with all that it follows."""
    shape = forest.nodes.tokens.shape
    may, closed = draw(masks(*shape)), torch.zeros(shape, dtype=torch.bool)
    for row, tree in enumerate(forest.trees):
        for i in range(len(tree.parents)):
            closed[row, i] = all(bool(may[row, node - 1]) for node in tree.path(i + 1)[1:])
    return closed


def nodes_of(
    trees: list[Tree],
    num_drafts: int,
    max_depth: int,
    parents: list[int] | None = None,
    tokens: list[int] | None = None,
) -> Nodes:
    """Trees as tensors; `parents` and `tokens`, one a place, are the rubbish behind them."""
    shape = (len(trees), num_drafts)
    all_parents, all_tokens = (
        torch.zeros(shape, dtype=torch.int64) if rubbish is None else torch.tensor(rubbish).view(shape)
        for rubbish in (parents, tokens)
    )
    for row, tree in enumerate(trees):
        all_parents[row, : len(tree.parents)] = torch.tensor(tree.parents, dtype=torch.int64)
        all_tokens[row, : len(tree.tokens)] = torch.tensor(tree.tokens, dtype=torch.int64)
    lengths = torch.tensor([len(tree.parents) for tree in trees])
    grades = torch.arange(num_drafts).expand(shape).clone()  # tells drafts apart
    return Nodes(all_tokens, lengths, grades, all_parents, max_depth)
