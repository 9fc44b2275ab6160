"""The form that is spelled out: a product of queries and keys, a softmax, a product with the values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from emssd_compile.passes.attention_sites.form import AttentionSite, Form, Miss, Subject
from emssd_compile.passes.attention_sites.products import Operand, Product, arrange, is_product, laid_like, product
from emssd_compile.passes.graph import (
    Evaluator,
    aten,
    inserting_for,
    scalar,
    token_dims,
    token_symbol,
)
from emssd_compile.passes.sampled_evaluator import SampledEvaluator

_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_SCALINGS = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar})
_FEW = 5

Given = Callable[[int], Tensor]
"""The value of a node for a number of tokens."""


@dataclass(frozen=True)
class SoftmaxPath:
    """From a product of queries and keys through a softmax to the product with the values.

    Attributes:
        scores: queries times keys.
        above: nodes between `scores` and the softmax, that one first.
        softmax: the softmax.
        below: nodes between the softmax and `output`.
        output: weights times values.
        scale: constant factor on `scores`.
        softcap: 0, or c in `c * tanh(scaled / c)`.
    """

    scores: Product
    above: tuple[fx.Node, ...]
    softmax: fx.Node
    below: tuple[fx.Node, ...]
    output: Product
    scale: float
    softcap: float

    @property
    def weights(self) -> fx.Node:
        """The attention weights as they meet the values."""
        return (self.softmax, *self.below)[-1]

    @property
    def length(self) -> int:
        """How many nodes it has."""
        return len(self.above) + len(self.below) + 3


class SoftmaxOfProducts(Form[SoftmaxPath]):
    """`%s = matmul(%q, %kT); ...; %w = softmax(%masked, -1); ...; %o = matmul(%w, %v)`.

    Either product may be any spelling of `products`. What stands between them is not matched: it is evaluated, and has
    to be a scale, perhaps a softcap, and a mask that is known (`mask_family`).
    """

    def match(self, subject: Subject, node: fx.Node) -> SoftmaxPath | Miss | None:
        """The way from the product of queries and keys over the softmax `node` to the product with the values."""
        return softmax_path(subject, node)

    def check(self, subject: Subject, match: SoftmaxPath) -> Miss | None:
        """Scores that are not what scale, cap and mask make of the product."""
        for node in match.above:
            if node.target == aten.cat.default:
                return Miss(node, "scores are joined with others before their softmax", match.length)
        return check_products(subject, match)

    def rewrite(self, subject: Subject, match: SoftmaxPath) -> AttentionSite:
        """The operands of both products, turned to the layout of the op; what lies between becomes the probe."""
        return site_of(subject, Weights(subject, match))


def softmax_path(subject: Subject, node: fx.Node) -> SoftmaxPath | Miss | None:
    """The path through the softmax `node`; None if it is no softmax over tokens."""
    if node.target not in _SOFTMAX or node not in subject.dependent:
        return None
    if len(token_dims(node, token_symbol(subject.graph_module.graph))) != 2:
        return None
    up = _up(subject, node)
    if isinstance(up, Miss):
        return up
    scores, above, scale, softcap = up
    down = _down(subject, node, len(above) + 2)
    if isinstance(down, Miss):
        return down
    below, output = down
    return SoftmaxPath(scores, above, node, below, output, scale, softcap)


def _up(subject: Subject, softmax: fx.Node) -> tuple[Product, tuple[fx.Node, ...], float, float] | Miss:
    """From a softmax to the product of queries and keys: (product, nodes between, scale, softcap)."""
    node, scale, softcap = softmax, 1.0, 0.0
    between: list[fx.Node] = []
    while (found := product(node, subject.dependent)) is None:
        source = _shifted(node) or _only(subject.varying(node))
        if source is None:
            reason = "a softmax over tokens whose scores are not a product of queries and keys"
            if len(subject.varying(node)) > 1 and not is_product(node):
                reason = "scores are combined with values that depend on the token ids before their softmax"
            return Miss(node, reason, len(between) + 1)
        factor = _factor(subject.graph_module, node, source)
        if node.target == aten.tanh.default:
            softcap, scale = scale, 1.0
        scale *= factor
        if node is not softmax:
            between.append(node)
        node = source
    return found, tuple(between), scale * found.alpha() * (softcap or 1.0), softcap


def _only(nodes: list[fx.Node]) -> fx.Node | None:
    return nodes[0] if len(nodes) == 1 else None


def _shifted(node: fx.Node) -> fx.Node | None:
    """x, if `node` is `x - max(x)`: written against overflow, and undone by the softmax."""
    if node.target != aten.sub.Tensor:
        return None
    source, most = node.args[0], node.args[1]
    if isinstance(most, fx.Node) and most.target == operator.getitem:
        most = most.args[0]
    largest = isinstance(most, fx.Node) and most.target in (aten.amax.default, aten.max.dim)
    return source if isinstance(source, fx.Node) and largest and most.args[0] is source else None  # type: ignore[union-attr]


def _factor(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> float:
    """By which constant `node` multiplies `source` (1 if it does something else: that shows when it is evaluated)."""
    if node.target not in _SCALINGS:
        return 1.0
    other = node.args[1] if node.args[0] is source else node.args[0]
    value = scalar(other)
    if value is None:
        tensor = Evaluator(graph_module, 3)(other) if isinstance(other, fx.Node) else None
        if not isinstance(tensor, Tensor) or tensor.numel() != 1:
            return 1.0
        value = float(tensor)
    return value if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / value


def _down(subject: Subject, softmax: fx.Node, matched: int) -> tuple[tuple[fx.Node, ...], Product] | Miss:
    """From a softmax to its product with the values: (nodes between, product)."""
    node = softmax
    below: list[fx.Node] = []
    while True:
        users = list(node.users)
        if len(users) != 1:
            reason = f"attention weights are used in {len(users)} places; one product with the values is known"
            return Miss(node, reason, matched + len(below))
        user = users[0]
        found = product(user, subject.dependent)
        if found is not None:
            return tuple(below), found
        if subject.varying(user) != [node]:
            reason = "attention weights are combined with other values before they meet the values' product"
            return Miss(user, reason, matched + len(below))
        below.append(user)
        node = user


def check_products(subject: Subject, path: SoftmaxPath) -> Miss | None:
    """Why the two products are not those of an attention; None if they are."""
    scores, output = path.scores, path.output
    left, right = scores.left, scores.right
    tokens = left.tokens + right.tokens
    if len(left.tokens) != 1 or len(right.tokens) != 1 or len(set(tokens) & set(scores.out)) != 2:
        return Miss(scores.node, "the scores do not relate each query to each key", path.length)
    if not scores.contracted:
        return Miss(scores.node, "the scores sum over no feature of queries and keys", path.length)
    weights, values = output.other(path.weights)
    if len(weights.tokens) != 2 or len(values.tokens) != 1 or output.contracted != values.tokens:
        return Miss(output.node, "the weights' product with the values does not sum over keys alone", path.length)
    heads = set(scores.out) - set(tokens)
    if not heads <= set(Weights(subject, path).query.letters):
        return Miss(scores.node, "keys have heads that queries do not have", path.length)
    return None


class Weights:
    """What a path computes between its products, evaluated; raw scores and weights are `[H, T, T]`, query by key.

    Args:
        subject: the graph.
        path: with products that `check_products` takes.
        given: values of nodes beside the path, by node; each is given the number of tokens.
    """

    def __init__(self, subject: Subject, path: SoftmaxPath, given: dict[fx.Node, Given] | None = None) -> None:
        self.graph_module = subject.graph_module
        self.numbers = subject.numbers
        self.path = path
        self.given = given or {}
        self.query, self.key = path.scores.left, path.scores.right
        self.entering, self.values = path.output.other(path.weights)
        if not self._answers_to_rows():
            self.query, self.key = self.key, self.query

    @property
    def heads(self) -> str:
        """Letters of the scores' heads: those that queries and keys share, then those of a group of queries."""
        tokens = self.query.tokens + self.key.tokens
        return _ordered("".join(c for c in self.path.scores.out if c not in tokens), self.key)

    @property
    def num_heads(self) -> int:
        """Hq."""
        return math.prod(self.path.scores.sizes(self.heads))

    @property
    def rows(self) -> str:
        """Letters of the heads and of the query as they enter the product with the values."""
        (query,) = set(self.entering.tokens) - set(self.values.tokens)
        heads = "".join(c for c in self.entering.letters if c not in self.entering.tokens)
        return _ordered(heads, self.values) + query

    @property
    def features(self) -> str:
        """Letters of the values' features."""
        return "".join(c for c in self.path.output.out if c not in self.entering.letters)

    def __call__(self, places: Tensor, scores: Tensor) -> Tensor:
        """Weights for raw scores of the tokens at `places`."""
        value: Tensor = self.evaluator(places, scores)(self.entering.node)
        return laid_out(value.float(), self.entering.letters, self.rows + self.values.tokens).reshape(scores.shape)

    def probe_key(self) -> Hashable:
        """Equal for paths of a graph that compute the same weights of the same scores."""
        product, heads = self.path.scores, self.heads
        letters = product.out, heads, self.query.tokens, self.key.tokens, self.entering.letters, self.rows
        added = product.added and (self.numbers(product.added), product.beta(), product.alpha())
        sizes = *product.sizes(heads), product.node.meta["val"].dtype
        return letters, self.values.tokens, added, sizes, self.number(self.entering.node)

    def number(self, node: fx.Node) -> int:
        """Equal for nodes of several paths that are computed alike of the scores."""
        return self.numbers.where({self.path.scores.node: "scores", **dict.fromkeys(self.given, "given")})(node)

    def evaluator(self, places: Tensor, scores: Tensor) -> SampledEvaluator:
        """Computes nodes of the path for raw scores of the tokens at `places`."""
        product, tokens = self.path.scores, len(places)
        sizes = [tokens if n == -1 else n for n in product.sizes(self.heads)]
        raw = scores.to(product.node.meta["val"].dtype).reshape(*sizes, tokens, tokens)
        raw = laid_out(raw, self.heads + self.query.tokens + self.key.tokens, product.out)
        if product.added is not None:  # the raw scores stand for the product alone
            bias: Tensor = SampledEvaluator(self.graph_module, places)(product.added)
            raw = product.beta() * bias + product.alpha() * raw
        given = {product.node: raw.contiguous(), **{n: value(tokens) for n, value in self.given.items()}}
        return SampledEvaluator(self.graph_module, places, given)

    def _answers_to_rows(self) -> bool:
        """Whether the left operand holds the queries: a score of its fourth token changes the fourth row of weights."""
        device = self.path.scores.node.meta["val"].device
        places, scores = (
            torch.arange(_FEW, device=device),
            torch.zeros(self.num_heads, _FEW, _FEW, dtype=torch.float32, device=device),
        )
        try:
            before = self(places, scores)
            scores[:, 3, 1] = 1.0 / (self.path.scale or 1.0)
            return not torch.equal(before[:, 3], self(places, scores)[:, 3])
        except KeyError:  # it depends on the token ids, and is refused for that where the mask is recognised
            return True


def site_of(subject: Subject, weights: Weights, result: fx.Node | None = None) -> AttentionSite:
    """The site of a path whose weights `Weights` evaluates, without sinks.

    Args:
        subject: the graph.
        weights: the path.
        result: the node that the op stands for, if that is not the product with the values; same layout.
    """
    path = weights.path
    graph, output = subject.graph_module.graph, path.output
    with inserting_for(output.node):
        query = arrange(graph, weights.query, weights.heads, path.scores.contracted)
        key = arrange(graph, weights.key, _shared(weights.heads, weights.key), path.scores.contracted)
        value = arrange(graph, weights.values, _shared(weights.rows[:-1], weights.values), weights.features)

    def place(graph: fx.Graph, attended: fx.Node) -> fx.Node:
        letters = weights.rows + weights.features
        return laid_like(graph, attended, output.sizes(letters), [letters.index(c) for c in output.out])

    return AttentionSite(
        result=result or output.node,
        query=query,
        key=key,
        value=value,
        place=place,
        scale=path.scale,
        softcap=path.softcap,
        sinks=None,
        probe=weights,
        probe_key=weights.probe_key(),
    )


def _ordered(heads: str, second: Operand) -> str:
    """Letters of heads: those that the second operand shares, then those that differ within its groups."""
    return "".join(sorted(heads, key=lambda c: c not in second.letters))


def _shared(heads: str, operand: Operand) -> str:
    return "".join(c for c in heads if c in operand.letters)


def laid_out(value: Tensor, letters: str, wanted: str) -> Tensor:
    """A tensor with dimensions `letters` permuted to `wanted`."""
    return value.permute([letters.index(c) for c in wanted])
