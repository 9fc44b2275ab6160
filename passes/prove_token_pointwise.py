"""Prove that nothing but attention mixes tokens."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor, fx

from emssd_compile.ops import attention
from emssd_compile.passes.graph import (
    aten,
    has_symbol,
    literals,
    output,
    placeholder,
    refuse,
    token_dims,
    token_symbol,
)
from emssd_compile.passes.token_rules import check

_TOKENS = 12
_TRIALS = 16
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
_SIZES = frozenset({"size", "sizes", "shape", "split_size", "split_sizes"})
"""Arguments of ops that only say how large a result is."""
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class ProveTokenPointwise:
    """Check the claim on which unpadding rests; change nothing.

    Side by side in `T` lie tokens of different rows. If every op but attention acts on each token by itself, packing
    rows is unpadding and nothing of one row can reach another. The proof follows the token dimension from the inputs
    to the output, op by op (`token_rules`). Where rules cannot tell (a mixture of experts sorts tokens and puts them
    back), the influence test decides: attention is replaced by a token-local stand-in, one token is changed, and no
    other token's output may change.

        accepted:  %y = linear(%x[1,T,8], %w)       refused:  %s = cumsum(%x[1,T,8], 1)
    """

    name = "prove_token_pointwise"

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """See the class. Raises UnsupportedModelError naming the node that mixes tokens."""
        objection = find_mixing(graph_module)
        if objection is None:
            self.notes = ("proved: nothing but attention mixes tokens",)
            return 0
        node, reason = objection
        leak = influence(graph_module)
        if leak:
            raise refuse(node, f"tokens are mixed outside attention: {reason} ({leak})")
        self.notes = (f"tested: no token influences another; not proved, because of %{node.name} ({node.target})",)
        return 0


def find_mixing(graph_module: fx.GraphModule) -> tuple[fx.Node, str] | None:
    """The first node not proven to act on each token by itself, and why; None if the proof goes through."""
    graph = graph_module.graph
    symbol = token_symbol(graph)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        reason = _objection(node, symbol)
        if reason:
            return node, reason
    return None


def _objection(node: fx.Node, symbol: sympy.Symbol) -> str | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None  # operator.getitem and arithmetic on sizes
    if node.target == aten.sym_size.int:
        return None
    if _size_used_as_value(node, node.target):
        return "it computes with the number of tokens"
    dims = {}
    for source in node.all_input_nodes:
        found = _all_token_dims(source, symbol)
        if len(found) > 1:
            return f"its input %{source.name} relates tokens to tokens"
        if found:
            dims[source] = found[0]
    out = _all_token_dims(node, symbol)
    if len(out) > 1:
        return "its result relates tokens to tokens"
    if not dims:
        return None
    if not out:
        return "the token dimension disappears in it"
    return check(node, dims, out[0])


def _all_token_dims(node: fx.Node, symbol: sympy.Symbol) -> tuple[int, ...]:
    value = node.meta.get("val")
    if not isinstance(value, (tuple, list)):
        return token_dims(node, symbol)
    # An op with several results: they must agree, or two dimensions are reported.
    sizes = [v.shape for v in value if isinstance(v, Tensor)]
    found = {tuple(d for d, size in enumerate(s) if has_symbol(size, symbol)) for s in sizes}
    return found.pop() if len(found) == 1 else (0, 0)


def _size_used_as_value(node: fx.Node, target: torch._ops.OpOverload) -> bool:
    """Whether a size enters the op as a number to compute with, not as a size."""
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    values = [value for name, value in given.items() if name not in _SIZES]
    sizes: list[fx.Node] = []
    fx.node.map_arg(values, lambda n: sizes.append(n) if isinstance(n.meta.get("val"), _SYMBOLIC) else None)
    return bool(sizes)


def influence(graph_module: fx.GraphModule) -> str:
    """Run the graph with a token-local stand-in for attention; say how a token influenced another, or "".

    Three properties are tried on random tokens: changing some changes no other's output, shuffling them shuffles the
    outputs, and half of them alone give the same as among all. Some of the ids drawn are integers that stand in the
    graph: what a forward compares ids with matters most. Products over groups of tokens may round differently when a
    group grows (a mixture of experts in fp32), so changes below `_ROUNDING` of the largest output pass; half precision
    must agree to the bit.
    """
    local = fx.GraphModule(graph_module, _localised(graph_module.graph))
    device = placeholder(graph_module.graph, "input_ids").meta["val"].device
    draw = _Ids(graph_module)

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        output: Tensor = local(ids[None].to(device), positions[None].to(device))
        return output.reshape(len(ids), -1)

    positions = torch.arange(_TOKENS)
    half = slice(_TOKENS // 2)
    with torch.no_grad():
        for _ in range(_TRIALS):
            ids, others, order = draw(), draw(), draw.permutation()
            base = run(ids, positions)
            changed = draw.some()
            moved = _differs(base, run(torch.where(changed, others, ids), positions)) & ~changed.to(device)
            if bool(moved.any()):
                return f"changing other tokens changed the output of token {int(moved.nonzero()[0])}"
            if bool(_differs(base[order.to(device)], run(ids[order], positions[order])).any()):
                return "shuffling the tokens changed their outputs"
            if bool(_differs(base[half], run(ids[half], positions[half])).any()):
                return "half of the tokens alone gave other outputs"
    return ""


class _Ids:
    """Random token ids, up to half of them integers that stand in the graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.vocabulary = _vocabulary(graph_module)
        self.generator = torch.Generator().manual_seed(0)
        found = {n for n in literals(graph_module.graph.nodes) if n < self.vocabulary}
        self.special = torch.tensor(sorted(found | {0}))

    def __call__(self) -> Tensor:
        plain = torch.randint(self.vocabulary, (_TOKENS,), generator=self.generator)
        special = self.special[torch.randint(len(self.special), (_TOKENS,), generator=self.generator)]
        rare = float(torch.rand((), generator=self.generator)) / 2  # often none: else each would always be there
        return torch.where(self.some(rare), special, plain)

    def some(self, share: float = 0.5) -> Tensor:
        """A random choice of about that share of the tokens."""
        return torch.rand(_TOKENS, generator=self.generator) < share

    def permutation(self) -> Tensor:
        return torch.randperm(_TOKENS, generator=self.generator)


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Which tokens [T] differ between two outputs [T, V], beyond rounding."""
    allowed = _ROUNDING.get(a.dtype, 0.0) * float(a.abs().max())
    return ~((a - b).abs() <= allowed).all(-1)


def _localised(source: fx.Graph) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(source, values)
    graph.output(result)
    for node in list(graph.nodes):
        if node.target == attention:
            node.target = _token_local
    return graph


def _token_local(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """Stands in for attention: depends on the token's own query, key and value only."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return (v * torch.tanh((q * k).sum(-1, keepdim=True))).transpose(1, 2).contiguous().transpose(1, 2)


def _vocabulary(graph_module: fx.GraphModule) -> int:
    ids = placeholder(graph_module.graph, "input_ids")
    for node in ids.users:
        if node.target == aten.embedding.default:
            table = node.args[0]
            assert isinstance(table, fx.Node)
            return int(table.meta["val"].shape[0])
    logits = output(graph_module.graph).args[0]
    assert isinstance(logits, fx.Node)
    return int(logits.meta["val"].shape[-1])


__all__ = ["ProveTokenPointwise", "find_mixing", "influence"]
