"""Prove that nothing but attention mixes tokens."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import Tensor, fx

from emssd_compile.ops import attention
from emssd_compile.passes.bar_unreadable import readable
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
from emssd_compile.precision import Precision

_TOKENS = 12
_TRIALS = 16
_MANY, _LARGE_TRIALS = 2048, 2
"""Tokens beside a short row in trials with many, and how many such trials: capacities of experts are far below."""
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_SIZES = frozenset({"size", "sizes", "shape", "split_size", "split_sizes"})
"""Arguments of ops that only say how large a result is."""
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class ProveTokenPointwise:
    """Check the claim on which unpadding rests; change nothing.

    Side by side in `T` lie tokens of different rows. If every op but attention acts on each token by itself, packing
    rows is unpadding and nothing of one row can reach another. The proof follows the token dimension from the inputs
    to the output, op by op (`token_rules`). Where rules cannot tell (a mixture of experts sorts tokens and puts them
    back), the influence test decides: attention is replaced by a token-local stand-in, the tokens of one row are
    changed and moved, to the end of what a row can hold among other places, and no output of another may change.

    Args:
        longest: tokens a row can hold.

        accepted:  %y = linear(%x[1,T,8], %w)       refused:  %s = cumsum(%x[1,T,8], 1)
    """

    name = "prove_token_pointwise"

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Prove or test. Raises UnsupportedModelError naming the node that mixes tokens."""
        objection = find_mixing(graph_module)
        if objection is None:
            self.notes = ("proved: nothing but attention mixes tokens",)
            return 0
        node, reason = objection
        leak = influence(graph_module, self.longest)
        if leak:
            raise refuse(node, f"tokens are mixed outside attention: {reason} ({leak})")
        tested = f"among up to {_MANY + _TOKENS} tokens, at positions up to {self.longest}"
        self.notes = (
            f"tested: no token influences another, {tested}; not proved, because of %{node.name} ({node.target})",
        )
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


def influence(graph_module: fx.GraphModule, longest: int = _TOKENS) -> str:
    """Run the graph with a token-local stand-in for attention; say how a token influenced another, or "".

    Several properties are tried on random tokens of two rows side by side: changing some changes no other's output,
    shuffling them shuffles the outputs, one row alone gives the same as beside the other, wherever the other stands and
    however many tokens it has. Some of the ids drawn are integers that stand in the graph: what a forward compares ids
    with matters most.

    Products over groups of tokens may round differently when a group grows (a mixture of experts), so changes below
    `_ROUNDING` of the largest output pass, and what is found is tried again in float64 before it counts.

    Args:
        graph_module: an L1 graph.
        longest: tokens a row can hold: positions are drawn up to there.
    """
    trials = _Trials(graph_module, longest)
    with torch.no_grad():
        for trial in range(_TRIALS):
            for check in (trials.few, trials.many) if trial < _LARGE_TRIALS and longest > _TOKENS else (trials.few,):
                state = trials.draw.generator.get_state()
                leak = check(trial)
                if leak and trials.dtype != torch.float64:
                    trials.draw.generator.set_state(state)
                    leak = trials.again_in_float64(check, trial, leak)
                if leak:
                    return leak
    return ""


class _Trials:
    """Random tokens through the graph with the stand-in for attention, compared."""

    def __init__(self, graph_module: fx.GraphModule, longest: int) -> None:
        self.local = fx.GraphModule(graph_module, _localised(graph_module.graph))
        self.device = placeholder(graph_module.graph, "input_ids").meta["val"].device
        self.dtype: torch.dtype = output(graph_module.graph).args[0].meta["val"].dtype  # type: ignore[union-attr]
        self.draw = _Ids(graph_module)
        self.longest = longest

    def again_in_float64(self, check: Callable[[int], str], trial: int, found: str) -> str:
        """The trial anew, where rounding is too small to be taken for an influence; `found` if that cannot be."""
        try:
            with Precision(torch.float64):
                return check(trial)
        except (RuntimeError, NotImplementedError):  # an op that knows no float64
            return found

    def run(self, ids: Tensor, positions: Tensor) -> Tensor:
        result: Tensor = self.local(ids[None].to(self.device), positions[None].to(self.device))
        return result.reshape(len(ids), -1)

    def start(self, trial: int, tokens: int) -> int:
        """Where a row of so many tokens begins: by turns at 0, so that it ends with the last position, or anywhere."""
        last = max(0, self.longest - tokens)
        return (0, last, self.draw.below(last + 1))[trial % 3]

    def few(self, trial: int) -> str:
        """Two rows of `_TOKENS` together; every token is looked at."""
        half, device = _TOKENS // 2, self.device
        steps = torch.arange(half)
        positions = torch.cat([self.start(trial, half) + steps, self.start(trial // 3, half) + steps])
        ids, others, order = self.draw(), self.draw(), self.draw.permutation()
        base = self.run(ids, positions)
        changed = self.draw.some()
        moved = _differs(base, self.run(torch.where(changed, others, ids), positions)) & ~changed.to(device)
        if bool(moved.any()):
            return f"changing other tokens changed the output of token {int(moved.nonzero()[0])}"
        if bool(_differs(base[order.to(device)], self.run(ids[order], positions[order])).any()):
            return "shuffling the tokens changed their outputs"
        if bool(_differs(base[:half], self.run(ids[:half], positions[:half])).any()):
            return "half of the tokens alone gave other outputs"
        elsewhere = positions.clone()
        elsewhere[half:] = self.start(trial + 1, half) + steps
        if bool(_differs(base[:half], self.run(ids, elsewhere)[:half]).any()):
            return "the positions of one row changed the outputs of another"
        return ""

    def many(self, trial: int) -> str:
        """A short row beside long ones, before or behind them: its outputs are looked at."""
        short = torch.arange(_TOKENS)
        ids, others = self.draw(), self.draw(_MANY)
        positions, place = self.start(trial, _TOKENS) + short, short + (_MANY if trial % 2 == 0 else 0)
        around = torch.arange(_MANY) % self.longest
        rows = [(others, around), (ids, positions)] if trial % 2 == 0 else [(ids, positions), (others, around)]
        beside = self.run(torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]))
        if bool(_differs(self.run(ids, positions), beside[place.to(self.device)]).any()):
            return f"{_MANY} tokens of other rows changed the outputs of a row"
        return ""


class _Ids:
    """Random token ids, up to half of them integers that stand in the graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.vocabulary = _vocabulary(graph_module)
        self.generator = torch.Generator().manual_seed(0)
        found = {n for n in literals(graph_module.graph.nodes) if n < self.vocabulary}
        self.special = torch.tensor(sorted(found | {0}))

    def __call__(self, tokens: int = _TOKENS) -> Tensor:
        plain = torch.randint(self.vocabulary, (tokens,), generator=self.generator)
        special = self.special[torch.randint(len(self.special), (tokens,), generator=self.generator)]
        rare = float(torch.rand((), generator=self.generator)) / 2  # often none: else each would always be there
        return torch.where(self.some(rare, tokens), special, plain)

    def some(self, share: float = 0.5, tokens: int = _TOKENS) -> Tensor:
        """A random choice of about that share of the tokens."""
        return torch.rand(tokens, generator=self.generator) < share

    def below(self, end: int) -> int:
        """A random number in [0, end)."""
        return int(torch.randint(end, (), generator=self.generator))

    def permutation(self) -> Tensor:
        return torch.randperm(_TOKENS, generator=self.generator)


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Which tokens [T] differ between two outputs [T, V], beyond rounding."""
    allowed = _ROUNDING.get(a.dtype, 0.0) * float(a.abs().max())  # half precision: to the bit
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
    """Stands in for attention: depends on the token's own query, key and value only, and on each element of them.

    Their product alone would not do: it is the same however far queries and keys are turned.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    weights = torch.linspace(1, 2, q.shape[-1], dtype=q.dtype, device=q.device)
    weight = torch.tanh((q * k + (q + 0.7 * k) * weights).sum(-1, keepdim=True) * q.shape[-1] ** -0.5)
    return (v * weight).transpose(1, 2).contiguous().transpose(1, 2)


def _vocabulary(graph_module: fx.GraphModule) -> int:
    logits = output(graph_module.graph).args[0]
    assert isinstance(logits, fx.Node)
    return readable(graph_module.graph) or int(logits.meta["val"].shape[-1])


__all__ = ["ProveTokenPointwise", "find_mixing", "influence"]
