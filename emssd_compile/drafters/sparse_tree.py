"""Trees of any shape, whose nodes are ranks: the r-th likeliest token of their depth (Medusa, 2401.10774)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import product

from torch import Tensor

from emssd_compile.drafters.tree_shape import MOST_NODES, TreeShape
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, number, shown

Path = tuple[int, ...]


@dataclass(frozen=True)
class SparseTree:
    """A tree that has the same shape in all rows and steps; its nodes may have any number of children each.

    Nodes are numbered breadth first: the root is node 0, then come the nodes at depth 1, ..., those of a depth in the
    order of their paths.

    Attributes:
        paths: of each node but the root, the ranks of the tokens between the root and it, its own last; rank 0 is the
            likeliest token of a depth.

    Example:
        `((0,), (1,), (0, 0), (0, 1))`: the two likeliest tokens behind the root, and the two likeliest of the next
        depth behind the first of them.
    """

    paths: tuple[Path, ...]

    @classmethod
    def of(cls, option: str, tree: object) -> SparseTree:
        """The tree that an option asks for: paths in any order, or how many children the nodes of each depth have.

        Raises:
            OptionError: it asks for none, lacks the parent of a node, has a node twice, or has more than `MOST_NODES`
                nodes; the message names the option.
        """
        if not isinstance(tree, Iterable) or isinstance(tree, str):
            raise OptionError(
                f"{option}={shown(tree)} is no tree; pass paths of ranks, such as ((0,), (1,), (0, 0)), or how many "
                "children there are at each depth, such as (4, 2, 2)"
            )
        nodes = list(tree)
        if not any(isinstance(node, Iterable) for node in nodes):
            return cls.regular(TreeShape.of(option, nodes))
        if len(nodes) > MOST_NODES:
            raise OptionError(f"{option} has {len(nodes)} drafts; use 1 to {MOST_NODES}")
        paths = [_path(f"{option}[{index}]", node) for index, node in enumerate(nodes)]
        if twice := sorted(path for path, times in Counter(paths).items() if times > 1):
            raise OptionError(f"{option} has {twice[0]} twice; siblings are different tokens, leave one out")
        if orphans := sorted(path for path in paths if len(path) > 1 and path[:-1] not in paths):
            raise OptionError(f"{option} has {orphans[0]} without its parent {orphans[0][:-1]}; add the parent")
        return cls(tuple(sorted(paths, key=lambda path: (len(path), path))))

    @classmethod
    def regular(cls, shape: TreeShape) -> SparseTree:
        """The tree in which all nodes of a depth have the likeliest tokens below them."""
        depths = range(1, shape.depth + 1)
        return cls(tuple(path for depth in depths for path in product(*map(range, shape.branching[:depth]))))

    @property
    def depth(self) -> int:
        """D, edges between the root and the deepest nodes."""
        return len(self.paths[-1])

    @property
    def num_nodes(self) -> int:
        """K, nodes besides the root."""
        return len(self.paths)

    @property
    def widths(self) -> tuple[int, ...]:
        """`[D]`, how many of the likeliest tokens of depth 1, 2, ..., D the tree is made of."""
        return tuple(1 + max(path[-1] for path in self.paths if len(path) == depth + 1) for depth in range(self.depth))

    @property
    def parents(self) -> tuple[int, ...]:
        """`[K]`, the node that each node but the root follows."""
        numbers: dict[Path, int] = {(): 0, **{path: number for number, path in enumerate(self.paths, 1)}}
        return tuple(numbers[path[:-1]] for path in self.paths)

    @property
    def depths(self) -> tuple[int, ...]:
        """`[K]`, the depth of each node but the root; ascending."""
        return tuple(map(len, self.paths))

    @property
    def ranks(self) -> tuple[int, ...]:
        """`[K]`, the place of each node's token among the likeliest of its depth, from 0."""
        return tuple(path[-1] for path in self.paths)


def calibrated_tree(accuracies: Sequence[Sequence[float]] | Tensor, num_nodes: int) -> SparseTree:
    """The tree of so many nodes that is expected to have the longest accepted path (2401.10774, section 2.3.3).

    A node is on the accepted path with the product of the accuracies along its own path, and what is expected of a tree
    is the sum of these over its nodes. A node is never likelier than its parent, so the likeliest nodes of all, found
    best first, are closed under parents and the optimum.

    Args:
        accuracies: `[D, ranks]`, the share of texts in which the token of that rank, of those that are drafted for that
            depth, is the right one; as measured.
        num_nodes: K; there may be fewer, where no others are ever right.

    Raises:
        OptionError: an accuracy is no share, all are 0 at depth 1, or `num_nodes` is out of range.

    Example:
        `calibrated_tree([[0.6, 0.2], [0.5, 0.1]], 3)` is `((0,), (1,), (0, 0))`, of which 0.6 + 0.2 + 0.3 tokens are
        expected.
    """
    count = integer("num_nodes", num_nodes, least=1, most=MOST_NODES)
    ranked = [_ranked(f"accuracies[{depth}]", row) for depth, row in enumerate(accuracies)]
    waiting: list[tuple[float, int, Path, float]] = []  # minus the product, depth, path in places, the parent's product

    def offer(parent: Path, place: int, product: float) -> None:
        """The node that has, among the children of a parent, the accuracy at this place of the largest ones."""
        depth = len(parent)
        if depth < len(ranked) and place < len(ranked[depth]) and (own := product * ranked[depth][place][0]) > 0:
            heappush(waiting, (-own, depth + 1, (*parent, place), product))

    offer((), 0, 1.0)
    chosen: list[Path] = []
    while waiting and len(chosen) < count:
        negative, _, places, above = heappop(waiting)
        chosen.append(tuple(ranked[depth][place][1] for depth, place in enumerate(places)))
        offer(places[:-1], places[-1] + 1, above)
        offer(places, 0, -negative)
    if not chosen:
        raise OptionError("accuracies: no token is ever right at depth 1; measure again, or train the head")
    return SparseTree.of("accuracies", chosen)


def _path(option: str, node: object) -> Path:
    """A node of a tree. Raises OptionError."""
    if not isinstance(node, Iterable) or isinstance(node, str):
        raise OptionError(f"{option}={shown(node)} is no path of ranks, such as (0, 1)")
    path = tuple(integer(f"{option}[{index}]", rank, least=0) for index, rank in enumerate(node))
    if not path:
        raise OptionError(f"{option} is empty: the root is no draft; leave it out")
    return path


def _ranked(option: str, row: object) -> list[tuple[float, int]]:
    """Accuracies with their ranks, the largest first. Raises OptionError."""
    if not isinstance(row, Iterable) or isinstance(row, str):
        raise OptionError(f"{option}={shown(row)} is no sequence of accuracies, one for each rank")
    shares = [float(number(f"{option}[{rank}]", share)) for rank, share in enumerate(row)]
    for rank, share in enumerate(shares):
        if not 0 <= share <= 1:
            raise OptionError(f"{option}[{rank}]={share} is out of range; pass 0 to 1")
    return sorted(((share, rank) for rank, share in enumerate(shares)), key=lambda pair: (-pair[0], pair[1]))
