"""Raise every form of attention to one op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from emssd_compile.ops import attention
from emssd_compile.passes.graph import (
    Evaluator,
    ancestors,
    aten,
    call,
    data_dependent,
    refuse,
    same_size,
    scalar,
    shape,
    token_dims,
    token_symbol,
)
from emssd_compile.passes.mask_family import MaskFamily, Probe, UnknownMaskError, recognise

_SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_MATMUL = frozenset({aten.matmul.default, aten.bmm.default})
_REPEAT = frozenset(
    {
        aten.reshape.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.flatten.using_ints,
    }
)


@dataclass
class _Site:
    """One attention as the model wrote it."""

    result: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    softcap: float
    probe: Probe
    literals: set[int]


class RaiseAttention:
    """Turn SDPA and eager matmul-softmax-matmul into `emssd::attention`, with the mask as attributes.

    Attention is the only op that may mix tokens, so it must be found in whatever form the model wrote it: SDPA with a mask
    or `is_causal`, eager code with scaling, fp32 softmax, soft-capping or a bias, key/value heads repeated by `expand` or
    by `enable_gqa`. The mask is recognised by evaluating it (see `mask_family`), after which its arithmetic is dead.

        before:  %m = where(%allowed[1,1,T,T], 0, -inf); %k4 = reshape(expand(unsqueeze(%k[1,2,T,8], 2), ...))
                 %o = scaled_dot_product_attention(%q[1,4,T,8], %k4[1,4,T,8], %v4[1,4,T,8], %m, scale=0.35)
        after:   %o = emssd.attention(%q[1,4,T,8], %k[1,2,T,8], %v[1,2,T,8], scale=0.35, window=0)
    """

    name = "raise_attention"

    def run(self, graph_module: fx.GraphModule) -> int:
        """See the class. Raises UnsupportedModelError for an attention whose mask is of no known family."""
        dependent = data_dependent(graph_module.graph)
        symbol = token_symbol(graph_module.graph)
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.target == _SDPA:
                site = _sdpa_site(graph_module, node, dependent)
            elif node.target in _SOFTMAX and node in dependent and len(token_dims(node, symbol)) == 2:
                site = _eager_site(graph_module, node, dependent)
            else:
                continue
            self._replace(graph_module, site)
            changed += 1
        return changed

    def _replace(self, graph_module: fx.GraphModule, site: _Site) -> None:
        graph = graph_module.graph
        query_shape = shape(site.query)
        assert query_shape is not None
        rank = len(query_shape)
        with graph.inserting_before(site.result):
            query = _four_dimensional(graph, site.query)
            key = _four_dimensional(graph, _peel_repeat(graph_module, site.key))
            value = _four_dimensional(graph, _peel_repeat(graph_module, site.value))
        family = _family(site, query)
        with graph.inserting_before(site.result):
            slopes = None
            if family.alibi_slopes is not None:
                slopes = _constant(graph_module, f"{site.result.name}_alibi_slopes", family.alibi_slopes)
            result = call(
                graph,
                attention,
                query,
                key,
                value,
                scale=site.scale,
                window=family.window,
                softcap=site.softcap,
                alibi_slopes=slopes,
            )
            result.meta = {**site.result.meta, **result.meta}
            if rank == 3:
                result = call(graph, aten.squeeze.dim, result, 0)
            elif rank == 5:
                groups = [query_shape[1], query_shape[2]]
                result = call(graph, aten.reshape.default, result, [1, *groups, -1, result.meta["val"].shape[-1]])
        site.result.replace_all_uses_with(result)
        graph.erase_node(site.result)  # dead-code elimination keeps SDPA: it could have drawn random numbers


def _family(site: _Site, query: fx.Node) -> MaskFamily:
    value = query.meta["val"]
    try:
        return recognise(
            site.probe, value.shape[1], site.scale, site.softcap, site.literals, value.dtype, value.device
        )
    except UnknownMaskError as error:
        raise refuse(site.result, f"the attention mask is not supported: {error}") from error
    except KeyError as error:
        raise refuse(site.result, f"the attention mask depends on token ids: {error.args[0]}") from error


def _sdpa_site(graph_module: fx.GraphModule, node: fx.Node, dependent: set[fx.Node]) -> _Site:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    if given.get("dropout_p", 0.0) != 0.0:
        raise refuse(node, "attention has dropout; call model.eval() first")
    if mask is None and not causal:
        raise refuse(node, "attention is bidirectional: every token sees later ones, so tokens cannot be cached")
    scale = given.get("scale")
    if scale is None:
        scale = float(given["query"].meta["val"].shape[-1]) ** -0.5

    def probe(tokens: int, scores: Tensor, constants: dict[int, int]) -> Tensor:
        scaled = scores * scale
        if causal:
            return MaskFamily().probabilities(scaled)
        value = Evaluator(graph_module, tokens, constants=constants)(mask)
        if value.dtype == torch.bool:
            scaled = scaled.masked_fill(~value.to(scaled.device), -torch.inf)
        else:
            scaled = scaled + value.float()
        return scaled.softmax(-1).reshape(scores.shape)

    literals = set() if mask is None else _literals(mask)
    return _Site(node, given["query"], given["key"], given["value"], float(scale), 0.0, probe, literals)


def _eager_site(graph_module: fx.GraphModule, softmax: fx.Node, dependent: set[fx.Node]) -> _Site:
    product, scale, softcap = _walk_up(graph_module, softmax, dependent)
    weights, result = _walk_down(softmax, dependent)
    query, key_transposed = product.args[-2:]
    assert isinstance(query, fx.Node)
    assert isinstance(key_transposed, fx.Node)
    with graph_module.graph.inserting_after(key_transposed):
        key = _untransposed(graph_module.graph, key_transposed)
    dtype = product.meta["val"].dtype

    def probe(tokens: int, scores: Tensor, constants: dict[int, int]) -> Tensor:
        given_shape = Evaluator(graph_module, tokens).concrete_shape(product)
        evaluator = Evaluator(
            graph_module, tokens, given=_given(graph_module, product, scores.to(dtype).reshape(given_shape)), constants=constants
        )
        value = evaluator(weights)
        return value.float().reshape(scores.shape)

    literals = _literals(weights, stop=product)
    return _Site(result, query, key, result.args[1], scale, softcap, probe, literals)  # type: ignore[arg-type]


def _given(graph_module: fx.GraphModule, product: fx.Node, scores: Tensor) -> dict[fx.Node, Tensor]:
    """`baddbmm` adds its first input to the product: the raw scores stand for the product alone."""
    if product.target != aten.baddbmm.default:
        return {product: scores}
    bias = product.args[0]
    assert isinstance(bias, fx.Node)
    beta = scalar(product.kwargs.get("beta", 1.0)) or 0.0
    alpha = scalar(product.kwargs.get("alpha", 1.0))
    value = Evaluator(graph_module, scores.shape[-1])(bias)
    return {product: beta * value + alpha * scores}


def _walk_up(
    graph_module: fx.GraphModule, softmax: fx.Node, dependent: set[fx.Node]
) -> tuple[fx.Node, float, float]:
    """From a softmax to the product of queries and keys: (product, scale, softcap)."""
    node, scale, softcap = softmax, 1.0, 0.0
    while True:
        inputs = [n for n in node.all_input_nodes if n in dependent]
        if node.target in _MATMUL and len(inputs) == 2:
            break
        if node.target == aten.baddbmm.default:
            scale *= scalar(node.kwargs.get("alpha", 1.0)) or 0.0
            break
        if len(inputs) != 1:
            raise refuse(node, "a softmax over tokens whose scores are not a product of queries and keys")
        factor = _factor(graph_module, node, inputs[0])
        if node.target == aten.tanh.default:
            softcap, scale = scale, 1.0
        scale *= factor
        node = inputs[0]
    return node, scale * (softcap or 1.0), softcap


def _factor(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> float:
    """By which constant `node` multiplies `source` (1 if it does something else: that shows when it is evaluated)."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return 1.0
    other = node.args[1] if node.args[0] is source else node.args[0]
    value = scalar(other)
    if value is None:
        tensor = Evaluator(graph_module, 3)(other) if isinstance(other, fx.Node) else None
        if tensor is None or tensor.numel() != 1:
            return 1.0
        value = float(tensor)
    return value if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / value


def _walk_down(softmax: fx.Node, dependent: set[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """From a softmax to its product with the values: (weights as they enter it, product)."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise refuse(node, f"attention weights are used in {len(users)} places; one product with the values is known")
        user = users[0]
        if user.target in _MATMUL and user.args[0] is node:
            return node, user
        if [n for n in user.all_input_nodes if n in dependent] != [node]:
            raise refuse(user, "attention weights are combined with other values before they meet the values' product")
        node = user


def _untransposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The keys [.., T, D] behind their transpose [.., D, T]."""
    rank = len(shape(node) or ())
    if node.target == aten.transpose.int:
        dims = {d % rank for d in node.args[1:] if isinstance(d, int)}
        if dims == {rank - 1, rank - 2}:
            return node.args[0]  # type: ignore[return-value]
    return call(graph, aten.transpose.int, node, -1, -2)


def _four_dimensional(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """[heads, T, D] or [1, groups, heads a group, T, D] as [1, heads, T, D]."""
    rank = len(shape(node) or ())
    if rank == 3:
        return call(graph, aten.unsqueeze.default, node, 0)
    if rank == 5:
        return call(graph, aten.flatten.using_ints, node, 1, 2)
    return node


def _peel_repeat(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Keys or values [1, Hkv, T, D] before their heads were repeated to [1, Hq, T, D]; `node` if they were not."""
    found, current = node, node
    symbol = token_symbol(graph_module.graph)
    heads_first = token_dims(node, symbol) == (len(shape(node) or ()) - 2,)
    while heads_first and current.target in _REPEAT and isinstance(current.args[0], fx.Node):
        current = current.args[0]
        if _is_repeat(graph_module, current, node):
            found = current
    return found


def _is_repeat(graph_module: fx.GraphModule, source: fx.Node, repeated: fx.Node) -> bool:
    """Whether `repeated` holds each head of `source` several times in a row, found by evaluating the nodes between."""
    a, b = shape(source), shape(repeated)
    if a is None or b is None or len(a) != 4 or len(b) != 4:
        return False
    if not (isinstance(a[1], int) and isinstance(b[1], int) and b[1] % a[1] == 0 and b[1] > a[1]):
        return False
    if not (same_size(a[0], 1) and same_size(a[2], b[2]) and same_size(a[3], b[3])):
        return False
    evaluator = Evaluator(graph_module, 3)
    size = evaluator.concrete_shape(source)
    labels = torch.arange(torch.Size(size).numel(), device=evaluator.device).reshape(size)
    evaluator.values[source] = labels
    return torch.equal(evaluator(repeated), labels.repeat_interleave(b[1] // a[1], dim=1))


def _literals(node: fx.Node, stop: fx.Node | None = None) -> set[int]:
    """Integer literals in the subgraph of `node` (without what `stop` is computed from)."""
    inside = ancestors([node]) - (ancestors(stop.all_input_nodes) if stop is not None else set())
    found: set[int] = set()

    def note(leaf: object) -> object:
        if type(leaf) is int and 0 < leaf < 2**31:
            found.add(leaf)
        return leaf

    for member in inside:
        if member.op == "call_function":
            fx.node.map_aggregate((member.args, member.kwargs), note)  # type: ignore[arg-type]
    return found


def _constant(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    graph_module.register_buffer(name, value, persistent=False)
    node = graph_module.graph.get_attr(name)
    fake = next(n.meta["val"] for n in graph_module.graph.nodes if "val" in n.meta)
    node.meta["val"] = fake.fake_mode.from_tensor(value, static_shapes=True)
    return node
