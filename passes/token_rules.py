"""Per-op rules: does this op act on each token by itself?

A rule gets the node and the token dimension of each input (`dims`) and of the output, and answers None (it does) or a
reason (it does not, or the rule cannot tell).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from emssd_compile.errors import OptionError
from emssd_compile.ops import attention
from emssd_compile.passes.attention_sites.products import einsum_terms
from emssd_compile.passes.graph import argument, aten, is_pointwise, same_size, shape

TokenRule = Callable[[fx.Node, dict[fx.Node, int], int], str | None]


def check(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    """Why `node` mixes tokens, or None if it provably does not.

    Args:
        node: a call of an ATen op with at least one input that has a token dimension.
        dims: token dimension of those inputs.
        out: token dimension of the output.
    """
    if node.target in RULES:
        return RULES[node.target](node, dims, out)
    if is_pointwise(node.target):
        return _broadcast(node, dims, out)
    return "no rule proves that this op treats each token by itself"


def register_token_rule(op: object, rule: TokenRule) -> None:
    """Say how an op of yours treats tokens, so that a model with it is proved rather than tested.

    A quantised product is what a linear layer is, as far as tokens are concerned:

        register_token_rule(torch.ops.mine.int4_linear.default, linear_rule)

    Args:
        op: as it stands in the graph: an overload.
        rule: called for each place where the op reads tokens; see the module's docstring.

    Raises:
        OptionError: `op` is no overload, or there is a rule for it here.
    """
    if not isinstance(op, torch._ops.OpOverload):
        raise OptionError(
            f"register_token_rule wants an op's overload, such as torch.ops.mine.linear.default, not {op!r}"
        )
    if op in RULES and op not in _registered:
        raise OptionError(f"register_token_rule: there is a rule for {op} already")
    if not callable(rule):
        raise OptionError(f"register_token_rule wants a function for {op}, not {rule!r}")
    RULES[op] = rule
    _registered.add(op)


def _rank(node: fx.Node) -> int:
    return len(shape(node) or ())


def _broadcast(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    """Pointwise: dimensions are aligned from the right."""
    for source, dim in dims.items():
        if dim - _rank(source) != out - _rank(node):
            return "tokens of one operand meet other tokens of another (their token dimensions are not aligned)"
    return None


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _reduces(index: int, name: str, default: Any = None) -> TokenRule:
    """An op that works along the dimensions in its argument `index`: tokens must not lie along them."""

    def rule(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        along = _argument(node, index, name, default)
        if along is None or along == []:
            return "it reduces over all dimensions, the tokens' included"
        along = [along] if isinstance(along, int) else along
        if any(a % _rank(source) == dims[source] for a in along):
            return "it works along the token dimension"
        return None

    return rule


def _trailing(index: int) -> TokenRule:
    """An op that normalises over the trailing dimensions given by its argument `index`."""

    def rule(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        normalized = node.args[index]
        assert isinstance(normalized, Sequence)
        return "it normalises over tokens" if dims[source] >= _rank(source) - len(normalized) else None

    return rule


def linear_rule(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    """A product of each row of the first argument with weights, whatever form these have."""
    source, others = node.args[0], node.args[1:]
    if any(o in dims for o in others if isinstance(o, fx.Node)):
        return "its weight depends on the tokens"
    assert isinstance(source, fx.Node)
    return "it sums over tokens" if dims[source] == _rank(source) - 1 else None


def _matmul(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    left, right = argument(node, -2), argument(node, -1)
    if left in dims and dims[left] == _rank(left) - 1:
        return "it sums over tokens"
    if right in dims and dims[right] == max(_rank(right) - 2, 0):
        return "it sums over tokens"
    if left in dims and right in dims:
        in_batch = all(dims[x] - _rank(x) < -2 and dims[x] - _rank(x) == out - _rank(node) for x in (left, right))
        return None if in_batch else "it multiplies tokens with tokens"
    if len(node.args) == 3 and (bias := argument(node, 0)) in dims:  # addmm, baddbmm
        return _broadcast(node, {bias: dims[bias]}, out)
    return None


def _reshape(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = shape(source) or (), shape(node) or ()
    if not same_size(before[dims[source]], after[out]):
        return "it merges or splits the token dimension"
    left, right = math.prod(before[: dims[source]]), math.prod(after[:out])
    return None if same_size(left, right) else "it moves tokens across other dimensions"


def _moves(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    """Permutations, squeezes and the like: each output element is one input element of the same token."""
    return None


def _cuts(index: int, name: str) -> TokenRule:
    """An op that cuts, joins or picks along the dimension in its argument `index`."""

    def rule(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
        along = _argument(node, index, name, 0)
        for source, dim in dims.items():
            if along % _rank(source) == dim:
                return "it cuts, joins or picks along the token dimension"
        if node.target == aten.cat.default and set(dims.values()) != {out}:
            return "tokens lie along different dimensions of its inputs"
        return None

    return rule


def _embedding(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    return "its table depends on the tokens" if node.args[0] in dims else None


def _index(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    """`table[indices]` with a table of constants; or constants picking along another dimension than the tokens'."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(indices, (list, tuple))
    if not isinstance(source, fx.Node) or source not in dims:
        used = {i: dims[i] for i in indices if isinstance(i, fx.Node) and i in dims}
        ranks = {_rank(i) for i in indices if isinstance(i, fx.Node)}
        return None if len(ranks) == 1 and len(set(used.values())) == 1 else "its indices are not aligned by token"
    if any(isinstance(i, fx.Node) and i in dims for i in indices):
        return "it looks up tokens by values that depend on tokens"
    dim = dims[source]
    return "it picks along the token dimension" if dim < len(indices) and indices[dim] is not None else None


def _gather(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    along = node.args[1]
    for source, dim in dims.items():
        if along % _rank(source) == dim:  # type: ignore[operator]
            return "it looks up along the token dimension"
    return None if set(dims.values()) == {out} else "tokens lie along different dimensions of its inputs"


def _index_select(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    source, along, index = node.args
    if source in dims:
        assert isinstance(source, fx.Node)
        if index in dims or along % _rank(source) == dims[source]:  # type: ignore[operator]
            return "it picks along the token dimension"
    return None


def _einsum(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    """One letter stands for the tokens, in every operand and in the result."""
    terms = einsum_terms(node)
    if terms is None:
        return "it takes the diagonal of an operand"
    for source, letters in terms.operands:
        if source in dims and letters[dims[source]] != terms.out[out]:
            return "it sums over tokens, or multiplies tokens with tokens"
    return None


def _attention(node: fx.Node, dims: dict[fx.Node, int], out: int) -> str | None:
    if all(dims.get(n) == 2 for n in node.args[:3] if isinstance(n, fx.Node)) and out == 2:
        return None
    return "queries, keys and values are not laid out by token"


RULES: dict[Any, TokenRule] = {
    attention: _attention,
    aten.linear.default: linear_rule,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _matmul,
    aten.baddbmm.default: _matmul,
    aten._weight_int8pack_mm.default: linear_rule,
    aten._weight_int4pack_mm_for_cpu.default: linear_rule,
    aten.einsum.default: _einsum,
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.layer_norm.default: _trailing(1),
    aten.rms_norm.default: _trailing(1),
    aten.native_layer_norm.default: _trailing(1),
    aten.reshape.default: _reshape,
    aten.squeeze.dim: _moves,
    aten.squeeze.dims: _moves,
    aten.unsqueeze.default: _moves,
    aten.permute.default: _moves,
    aten.transpose.int: _moves,
    aten.movedim.int: _moves,
    aten.expand.default: _broadcast,
    aten.expand_as.default: lambda node, dims, out: _broadcast(
        node, {n: d for n, d in dims.items() if n is node.args[0]}, out
    ),
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.view_as_complex.default: _moves,
    aten.view_as_real.default: _moves,
    aten.slice.Tensor: _cuts(1, "dim"),
    aten.select.int: _cuts(1, "dim"),
    aten.narrow.default: _cuts(1, "dim"),
    aten.split.Tensor: _cuts(2, "dim"),
    aten.split_with_sizes.default: _cuts(2, "dim"),
    aten.chunk.default: _cuts(2, "dim"),
    aten.unbind.int: _cuts(1, "dim"),
    aten.cat.default: _cuts(1, "dim"),
    aten.flip.default: _reduces(1, "dims"),
    aten.roll.default: _reduces(2, "dims"),
    aten.repeat_interleave.self_int: _cuts(2, "dim"),
    aten.softmax.int: _reduces(1, "dim"),
    aten._softmax.default: _reduces(1, "dim"),
    aten.log_softmax.int: _reduces(1, "dim"),
    aten.sum.dim_IntList: _reduces(1, "dim"),
    aten.mean.dim: _reduces(1, "dim"),
    aten.var.dim: _reduces(1, "dim"),
    aten.amax.default: _reduces(1, "dim"),
    aten.amin.default: _reduces(1, "dim"),
    aten.max.dim: _reduces(1, "dim"),
    aten.argmax.default: _reduces(1, "dim"),
    aten.cumsum.default: _reduces(1, "dim"),
    aten.topk.default: _reduces(2, "dim", -1),
    aten.sort.default: _reduces(1, "dim", -1),
    aten.linalg_vector_norm.default: _reduces(2, "dim"),
    aten.glu.default: _reduces(1, "dim", -1),
    aten.to.dtype: _broadcast,
    aten._to_copy.default: _broadcast,
    aten.type_as.default: lambda node, dims, out: _broadcast(
        node, {n: d for n, d in dims.items() if n is node.args[0]}, out
    ),
    aten.zeros_like.default: _moves,
    aten.ones_like.default: _moves,
    aten.full_like.default: _moves,
    aten.new_zeros.default: _moves,
    aten.new_ones.default: _moves,
}
_registered = set[object]()
