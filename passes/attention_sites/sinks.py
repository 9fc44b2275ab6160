"""Attention with sinks: a learned logit per head takes part in the softmax's sum, and has no value.

Written as a column beside the scores that is dropped after the softmax (2309.17453, section 3), or as a factor on the
output, `sigmoid(logsumexp(scores) - sink)`, which is the share of the sum that is not the sink's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from emssd_compile.passes.attention_sites.form import AttentionSite, Form, Miss, Subject
from emssd_compile.passes.attention_sites.softmax import (
    Given,
    SoftmaxPath,
    Weights,
    check_products,
    laid_out,
    site_of,
    softmax_path,
)
from emssd_compile.passes.graph import (
    Evaluator,
    ancestors,
    argument,
    aten,
    call,
    inserting_for,
    shape,
    token_dims,
    token_symbol,
)
from emssd_compile.precision import coarsest

_TOKENS = 12
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype})
_SPREAD = frozenset({aten.expand.default, aten.reshape.default, aten.unsqueeze.default, aten.repeat.default})


@dataclass(frozen=True)
class SinkPath:
    """A softmax path with a sink beside its scores.

    Attributes:
        path: the path.
        sink: the operand that holds the sinks, spread over the queries or not.
        factor: what the output is multiplied by, or None for a column of the softmax.
        result: the node that holds the attention's output.
    """

    path: SoftmaxPath
    sink: fx.Node
    factor: fx.Node | None
    result: fx.Node

    @property
    def heads(self) -> int:
        """Hq."""
        out, tokens = self.path.scores.out, self.path.scores.left.tokens + self.path.scores.right.tokens
        return math.prod(self.path.scores.sizes("".join(c for c in out if c not in tokens)))


class _Sinks(Form[SinkPath]):
    """What both forms share: the sinks' own tensor, and the proof that they are sinks."""

    def check(self, subject: Subject, match: SinkPath) -> Miss | None:
        """Evaluates the weights with and without the sinks: they must differ by the sinks' share of the sum."""
        miss = check_products(subject, match.path)
        if miss is not None:
            return miss
        sinks = _per_head(subject, match)
        if sinks is None:
            reason = "what joins the scores in their softmax is not one logit a head, the same for every query"
            return Miss(match.sink, reason, match.path.length)
        if not _are_sinks(subject, match, sinks):
            reason = "what joins the scores in their softmax does not act as an attention sink"
            return Miss(match.sink, reason, match.path.length)
        return None

    def rewrite(self, subject: Subject, match: SinkPath) -> AttentionSite:
        """As without sinks; the probe leaves their weight out, and the logits go to the op."""
        site = site_of(subject, _weights(subject, match, with_sinks=False), match.result)
        site.sinks = _per_head(subject, match)
        if isinstance(site.sinks, fx.Node) and len(shape(site.sinks) or ()) != 1:
            graph = subject.graph_module.graph
            with inserting_for(match.result):
                site.sinks = call(graph, aten.reshape.default, site.sinks, [-1])
        return site


class SinkColumn(_Sinks):
    """`%all = cat([%scores, %sinks], -1); %w = slice(softmax(%all, -1), 3, 0, -1); %o = matmul(%w, %v)`."""

    def match(self, subject: Subject, node: fx.Node) -> SinkPath | Miss | None:
        """A softmax over scores with one more column, which is dropped afterwards."""
        path = softmax_path(subject, node)
        if not isinstance(path, SoftmaxPath):
            return path
        joins = [n for n in path.above if n.target == aten.cat.default]
        if len(joins) != 1:
            return Miss(joins[0], "scores are joined with others more than once", path.length) if joins else None
        parts = joins[0].args[0]
        assert isinstance(parts, (list, tuple))
        beside = [n for n in parts if isinstance(n, fx.Node) and n not in subject.dependent]
        if len(beside) != 1:
            return Miss(joins[0], "more than one tensor joins the scores in their softmax", path.length)
        return SinkPath(path, beside[0], None, path.output.node)


class SinkFactor(_Sinks):
    """`%o = mul(matmul(softmax(%scores), %v), unsqueeze(sigmoid(sub(logsumexp(%scores, -1), %sinks)), -1))`."""

    def match(self, subject: Subject, node: fx.Node) -> SinkPath | Miss | None:
        """A softmax whose weights are multiplied by what a sink in its sum would make of them."""
        path = softmax_path(subject, node)
        if not isinstance(path, SoftmaxPath):
            return path
        output = path.output.node
        while len(output.users) == 1 and next(iter(output.users)).target in _CASTS:
            output = next(iter(output.users))
        users = list(output.users)
        if len(users) != 1 or users[0].target != aten.mul.Tensor:
            return None
        factor = next((n for n in users[0].all_input_nodes if n is not output), None)
        if factor is None or factor not in subject.dependent:
            return None
        sink = _beside_logsumexp(subject, factor)
        return None if sink is None else SinkPath(path, sink, factor, users[0])


def _beside_logsumexp(subject: Subject, factor: fx.Node) -> fx.Node | None:
    """The tensor that the log of the softmax's sum meets on its way to `factor`."""
    node, sink = factor, None
    while node.target != aten.logsumexp.default:
        sources = subject.varying(node)
        if len(sources) != 1:
            return None
        beside = [n for n in node.all_input_nodes if n not in subject.dependent and shape(n)]
        if node.target in (aten.sub.Tensor, aten.add.Tensor) and beside:
            sink = beside[0]
        node = sources[0]
    return sink


def _per_head(subject: Subject, match: SinkPath) -> fx.Node | Tensor | None:
    """What `match.sink` spreads over the queries: a tensor of Hq logits in the graph, or constants."""
    symbol = token_symbol(subject.graph_module.graph)
    node = match.sink
    while token_dims(node, symbol) or math.prod(shape(node) or ()) != match.heads:
        if node.target not in _SPREAD or not isinstance(node.args[0], fx.Node):
            return _constants(subject, match)
        node = argument(node, 0)
    return node


def _constants(subject: Subject, match: SinkPath) -> Tensor | None:
    """Sinks that are computed from nothing, as `zeros` in a softmax with one more in its sum."""
    if any(n.op == "get_attr" for n in ancestors([match.sink], values_only=True)):
        return None
    value: Tensor = Evaluator(subject.graph_module, _TOKENS)(match.sink)
    if value.numel() == 0 or not bool((value == value.flatten()[0]).all()):
        return None
    return value.flatten()[:1].expand(match.heads).contiguous()


def _weights(subject: Subject, match: SinkPath, *, with_sinks: bool) -> Weights:
    value = match.sink.meta["val"]

    def none(tokens: int) -> Tensor:
        size = Evaluator(subject.graph_module, tokens).concrete_shape(match.sink)
        return torch.full(size, -torch.inf, dtype=value.dtype, device=value.device)

    given: dict[fx.Node, Given] = {} if with_sinks else {match.sink: none}
    return Weights(subject, match.path, given) if match.factor is None else _Scaled(subject, match, given)


class _Scaled(Weights):
    """Weights of a path whose output is multiplied by a factor."""

    def __init__(self, subject: Subject, match: SinkPath, given: dict[fx.Node, Given]) -> None:
        assert match.factor is not None
        self.factor = match.factor
        super().__init__(subject, match.path, given)

    def probe_key(self) -> Hashable:
        """Equal for paths of a graph whose weights and factors are the same for the same scores."""
        output = self.path.output
        return super().probe_key(), self.number(self.factor), output.out, tuple(output.sizes(output.out)), self.features

    def __call__(self, places: Tensor, scores: Tensor) -> Tensor:
        """Probabilities `[H, P, P]` of the scores at these places, as if there were no sink."""
        weights = super().__call__(places, scores)
        output = self.path.output
        factor: Tensor = self.evaluator(places, scores)(self.factor)
        factor = factor.float().expand(Evaluator(self.graph_module, len(places)).concrete_shape(output.node))
        factor = laid_out(factor, output.out, self.rows + self.features).reshape(*weights.shape[:2], -1)
        same = factor == factor[..., :1]
        return weights * factor.masked_fill(~same, torch.nan).mean(-1, keepdim=True)


def _are_sinks(subject: Subject, match: SinkPath, sinks: fx.Node | Tensor) -> bool:
    without, with_sinks = (_weights(subject, match, with_sinks=given) for given in (False, True))
    logits: Tensor = sinks if isinstance(sinks, Tensor) else Evaluator(subject.graph_module, _TOKENS)(sinks)
    generator = torch.Generator(logits.device).manual_seed(0)
    raw = torch.randn(match.heads, _TOKENS, _TOKENS, dtype=torch.float32, device=logits.device, generator=generator) * 3
    scaled = raw * match.path.scale
    if match.path.softcap:
        scaled = match.path.softcap * torch.tanh(scaled / match.path.softcap)
    places = torch.arange(_TOKENS, device=logits.device)
    plain = without(places, raw)
    total = (scaled - plain.log()).diagonal(dim1=-2, dim2=-1)  # log of the sum over keys
    share = torch.sigmoid(total - logits.float().flatten()[:, None])[..., None]
    path = match.path
    dtype = coarsest(n.meta["val"].dtype for n in (path.scores.node, path.weights, path.output.node))
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(with_sinks(places, raw), plain * share, rtol=tolerance, atol=tolerance)
