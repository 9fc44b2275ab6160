"""Products of two tensors in one notation, that of einsum, whichever op the model wrote them with."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from emssd_compile.passes.graph import argument, aten, call, has_symbol, same_size, shape, token_symbol

BROADCAST = "_"
"""A dimension of size 1 that is repeated to meet the other operand's."""


@dataclass(frozen=True)
class Operand:
    """One side of a product.

    Attributes:
        node: the tensor.
        letters: one for each of its dimensions; `_` where size 1 meets a larger one.
        tokens: letters of its token dimensions; one for queries, keys and values, two for scores and weights.
    """

    node: fx.Node
    letters: str
    tokens: str

    def sizes(self, letters: str) -> list[int]:
        """Sizes of some of its dimensions, -1 for tokens."""
        found = shape(self.node) or ()
        picked = [found[self.letters.index(letter)] for letter in letters]
        return [-1 if isinstance(size, torch.SymInt) else size for size in picked]


@dataclass(frozen=True)
class Product:
    """`einsum("left,right->out")` of two tensors that depend on the token ids.

    Attributes:
        node: the op.
        left, right: its operands.
        out: letters of its result.
        added: what `baddbmm` adds to it.
    """

    node: fx.Node
    left: Operand
    right: Operand
    out: str
    added: fx.Node | None = None

    @property
    def contracted(self) -> str:
        """Letters that are summed over."""
        return "".join(c for c in self.left.letters if c in self.right.letters and c not in self.out)

    def alpha(self) -> float:
        """The constant factor that the op applies."""
        return float(self.node.kwargs.get("alpha", 1.0)) if self.added is not None else 1.0  # type: ignore[arg-type]

    def beta(self) -> float:
        """The constant factor that the op applies to `added`."""
        return float(self.node.kwargs.get("beta", 1.0))  # type: ignore[arg-type]

    def sizes(self, letters: str) -> list[int]:
        """Sizes of some dimensions of the result, -1 for tokens."""
        return Operand(self.node, self.out, "").sizes(letters)

    def other(self, node: fx.Node) -> tuple[Operand, Operand]:
        """The operand that is `node`, then the other one."""
        return (self.left, self.right) if self.left.node is node else (self.right, self.left)


def product(node: fx.Node, dependent: set[fx.Node]) -> Product | None:
    """`node` as a product of two tensors that depend on the token ids; None if it is none.

    Nothing may be summed in one of them alone.
    """
    for spelling in _SPELLINGS:
        if node.target in spelling.targets:
            return spelling().read(node, dependent)
    return None


def is_product(node: fx.Node) -> bool:
    """Whether `node` multiplies and sums, of whatever."""
    return any(node.target in spelling.targets for spelling in _SPELLINGS)


class _Spelling:
    """One way of writing a product."""

    targets: frozenset[object] = frozenset()

    def read(self, node: fx.Node, dependent: set[fx.Node]) -> Product | None:
        """The product that `node` is."""
        raise NotImplementedError


class Matmul(_Spelling):
    """`matmul(a, b)` and `bmm(a, b)`, with heads in any number of leading dimensions, or none."""

    targets = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})

    def read(self, node: fx.Node, dependent: set[fx.Node]) -> Product | None:
        """The product, if `node` is a `matmul` or `bmm` of two values that depend on the ids."""
        return _of_matrices(node, argument(node, 0), argument(node, 1), dependent)


class Baddbmm(_Spelling):
    """`baddbmm(bias, a, b)`."""

    targets = frozenset({aten.baddbmm.default})

    def read(self, node: fx.Node, dependent: set[fx.Node]) -> Product | None:
        """The product and its factor, if `node` is a `baddbmm` whose added input is a constant."""
        added = argument(node, 0)
        if added in dependent:
            return None
        return _of_matrices(node, argument(node, 1), argument(node, 2), dependent, added)


class Einsum(_Spelling):
    """`einsum(equation, [a, b])`, with an ellipsis or without, its result spelled out or implied."""

    targets = frozenset({aten.einsum.default})

    def read(self, node: fx.Node, dependent: set[fx.Node]) -> Product | None:
        """The product, if `node` is an einsum of two values that contracts as attention does."""
        terms = einsum_terms(node)
        if terms is None or len(terms.operands) != 2:
            return None
        return _product(node, terms.operands[0], terms.operands[1], terms.out, dependent)


_SPELLINGS = (Matmul, Baddbmm, Einsum)


def _of_matrices(
    node: fx.Node, left: fx.Node, right: fx.Node, dependent: set[fx.Node], added: fx.Node | None = None
) -> Product | None:
    ranks = [len(shape(n) or ()) for n in (left, right, node)]
    if min(ranks) < 2:
        return None
    batch = string.ascii_lowercase[: ranks[2] - 2]
    one = batch[ranks[2] - ranks[0] :] + "xy"
    two = batch[ranks[2] - ranks[1] :] + "yz"
    return _product(node, (left, one), (right, two), batch + "xz", dependent, added)


def _product(
    node: fx.Node,
    left: tuple[fx.Node, str],
    right: tuple[fx.Node, str],
    out: str,
    dependent: set[fx.Node],
    added: fx.Node | None = None,
) -> Product | None:
    operands = []
    for (source, letters), (other, others) in ((left, right), (right, left)):
        if source not in dependent:
            return None
        named = _without_broadcast(source, letters, dict(zip(others, shape(other) or (), strict=True)))
        tokens = _token_letters(source, named)
        alone = [c for c in named if c not in others and c not in out and c != BROADCAST]
        if alone:
            return None
        operands.append(Operand(source, named, tokens))
    return Product(node, operands[0], operands[1], out, added)


def _without_broadcast(node: fx.Node, letters: str, other: dict[str, int | torch.SymInt]) -> str:
    sizes = shape(node) or ()
    return "".join(
        BROADCAST if size == 1 and letter in other and not same_size(other[letter], 1) else letter
        for letter, size in zip(letters, sizes, strict=True)
    )


def _token_letters(node: fx.Node, letters: str) -> str:
    found = shape(node) or ()
    symbol = token_symbol(node.graph)
    return "".join(c for c, size in zip(letters, found, strict=True) if has_symbol(size, symbol))


@dataclass(frozen=True)
class Terms:
    """An einsum's equation: each operand with a letter a dimension, and the letters of the result."""

    operands: list[tuple[fx.Node, str]]
    out: str


def einsum_terms(node: fx.Node) -> Terms | None:
    """The equation of an `einsum`, ellipses spelled out; None where an operand repeats a letter (a diagonal)."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    written = inputs.split(",")
    spare = [c for c in string.ascii_letters if c not in equation]
    extra = 0  # dimensions that an ellipsis stands for
    for term, source in zip(written, operands, strict=True):
        if "..." in term:
            extra = max(extra, len(shape(source) or ()) - len(term) + 3)
    dots = "".join(spare[:extra])
    spelled = []
    for term, source in zip(written, operands, strict=True):
        assert isinstance(source, fx.Node)
        missing = len(shape(source) or ()) - len(term) + 3 if "..." in term else 0
        letters = term.replace("...", dots[extra - missing :] if missing else "")
        if len(set(letters)) != len(letters):
            return None
        spelled.append((source, letters))
    if not arrow:  # implied: what stands once, in the order of the alphabet, behind the ellipsis
        alone = [c for c in sorted(set(inputs) - set(",.")) if inputs.count(c) == 1]
        out = ("..." if "..." in inputs else "") + "".join(alone)
    return Terms(spelled, out.replace("...", dots))


def arrange(graph: fx.Graph, operand: Operand, heads: str, features: str) -> fx.Node:
    """An operand as `[1, heads, T, features]`, letters in the order given; adds nothing where it lies so already."""
    wanted = heads + operand.tokens + features
    order = [d for d, c in enumerate(operand.letters) if c == BROADCAST]
    order += [operand.letters.index(c) for c in wanted]
    node = permuted(graph, operand.node, order)
    sizes = [math.prod(operand.sizes(heads)), -1, math.prod(operand.sizes(features))]
    found = shape(node) or ()
    if len(found) == 3 and len(heads) == 1 == len(features):
        return call(graph, aten.unsqueeze.default, node, 0)
    if len(found) == 4 and len(features) == 1 and same_size(found[0], 1) and same_size(found[1], sizes[0]):
        return node
    return call(graph, aten.reshape.default, node, [1, *sizes])


def permuted(graph: fx.Graph, node: fx.Node, order: list[int]) -> fx.Node:
    """`node.permute(order)`, seen through the transposes that `node` already is."""
    while True:
        rank = len(order)
        if node.target == aten.transpose.int:
            swap = list(range(rank))
            one, two = _dims(node.args[1:], rank)
            swap[one], swap[two] = two, one
        elif node.target == aten.permute.default:
            swap = _dims(node.args[1], rank)
        else:
            break
        order = [swap[d] for d in order]
        node = argument(node, 0)
    moved = [d for d, source in enumerate(order) if d != source]
    if not moved:
        return node
    if len(moved) == 2:
        return call(graph, aten.transpose.int, node, *moved)
    return call(graph, aten.permute.default, node, order)


def _dims(written: Any, rank: int) -> list[int]:
    return [dim % rank for dim in written]


def laid_like(graph: fx.Graph, node: fx.Node, sizes: list[int], order: list[int]) -> fx.Node:
    """`[1, heads, T, features]` split into `sizes`, -1 for tokens, and these permuted to `order`."""
    found = shape(node) or ()
    kept = [-1 if isinstance(size, torch.SymInt) else size for size in found]
    if kept != sizes:
        node = call(graph, aten.reshape.default, node, sizes)
    return permuted(graph, node, order)
