"""What holds at each level of the graph, as code. Run by the manager whenever a level is reached."""

from __future__ import annotations

import torch
from torch import fx

from emssd_compile.ops import append_kv, attention, ragged_attention
from emssd_compile.passes.graph import aten, inputs, output, placeholder, refuse, token_dims, token_symbol
from emssd_compile.passes.prove_token_pointwise import find_mixing, influence


def _inputs(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "placeholder"]


def _expect_inputs(graph: fx.Graph, names: list[str]) -> None:
    found = _inputs(graph)
    if found[: len(names)] != names:
        raise refuse(output(graph), f"the graph's inputs are {found}; this level begins with {names}")


def _only_ops(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise refuse(node, "the graph holds a call that is not an op")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise refuse(node, "the graph holds a higher-order wrapper (control flow or a nested region)")


def _no_randomness(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.users and _draws(node):
            raise refuse(
                node,
                "the forward draws random numbers, so its tokens are not the same twice",
                "let nothing random run in eval mode, as in dropout(x, p, training=self.training)",
            )


def _draws(node: fx.Node) -> bool:
    """Whether an op takes numbers from a random generator as it is called: dropout may be turned off."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    arguments = node.target._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
    off = [given.get(name) is False for name in ("train", "training")] + [given.get("dropout_p") == 0.0]
    return not any(off)


def verify_captured(graph_module: fx.GraphModule) -> None:
    """L0: ATen ops only, none that draws, inputs `input_ids[1, T]` and `positions[1, T]`, T symbolic."""
    graph = graph_module.graph
    _only_ops(graph)
    _no_randomness(graph)
    _expect_inputs(graph, ["input_ids", "positions"])
    tokens = placeholder(graph, "input_ids").meta["val"].shape[1]
    if not isinstance(tokens, torch.SymInt) or not tokens.node.expr.free_symbols:
        raise refuse(placeholder(graph, "input_ids"), "the number of tokens is fixed")


def verify_canonical(graph_module: fx.GraphModule) -> None:
    """L1: one attention op, no relation of tokens to tokens, no shape that depends on data, only attention mixes."""
    verify_captured(graph_module)
    graph = graph_module.graph
    symbol = token_symbol(graph)
    for node in graph.nodes:
        if _shape_of_values(node):
            raise refuse(
                node,
                "the shape of a tensor depends on values (experts whose tokens are cut out by how many there are, with "
                "`tolist()`, `item()` or `nonzero()`): one graph has to serve every step",
                "write it for fixed shapes: sorted tokens and a grouped product, or every expert with a weight a token",
            )
        if len(token_dims(node, symbol)) > 1:
            raise refuse(node, "a relation of tokens to tokens is left: an attention was not recognised")
    mixing = find_mixing(graph_module)
    if mixing is not None and (leak := influence(graph_module)):
        raise refuse(mixing[0], f"{mixing[1]} ({leak})")


def verify_unpadded(graph_module: fx.GraphModule) -> None:
    """L2: every attention reads caches just appended to; results: hidden `[T, H]`, logits `[R, V]`, taps `[T, H]`."""
    graph = graph_module.graph
    _only_ops(graph)
    _expect_inputs(graph, ["input_ids", "positions", "row_ids", "offsets", "lengths", "logit_index"])
    appended: set[tuple[fx.Node, fx.Node]] = set()
    for node in graph.nodes:
        if node.target == attention:
            raise refuse(node, "an attention has no KV cache")
        if node.target == append_kv:
            appended.add(node.args[:2])
        if node.target == ragged_attention:
            if node.args[1:3] not in appended:
                raise refuse(node, "an attention reads a KV cache before this step's tokens are written to it")
            appended.remove(node.args[1:3])
    results = output(graph).args[0]
    if not (isinstance(results, (tuple, list)) and len(results) >= 2):
        raise refuse(output(graph), "the graph must return hidden states and logits")


def verify_step(graph_module: fx.GraphModule) -> None:
    """L3: it can be lowered, and the state that goes in comes out."""
    verify_lowerable(graph_module)
    results = output(graph_module.graph).args[0]
    needed = {str(node.target) for node in inputs(graph_module.graph) if node.meta.get("role") == "state"} | {"report"}
    assert isinstance(results, dict)
    if not needed <= set(results):
        raise refuse(output(graph_module.graph), f"the step must return at least {sorted(needed)}")


def verify_lowerable(graph_module: fx.GraphModule) -> None:
    """What every target may rely on: no host read, no shape that depends on data, results by name."""
    graph = graph_module.graph
    _only_ops(graph)
    for node in graph.nodes:
        if node.target in (aten._local_scalar_dense.default, aten.item.default):
            raise refuse(node, "the step reads a value back to the host")
        if _shape_of_values(node):
            raise refuse(node, "the step holds a shape that depends on data")
    if not isinstance(output(graph).args[0], dict):
        raise refuse(output(graph), "the results have no names")


def _shape_of_values(node: fx.Node) -> bool:
    """Whether a tensor that `node` gives has a size that only running it tells."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(t, torch.Tensor) and any(map(_unbacked, t.shape)) for t in tensors)


def _unbacked(size: int | torch.SymInt) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))
