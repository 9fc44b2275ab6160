"""Give back the logits of every token."""

from __future__ import annotations

import sys

import torch
from torch import fx

from emssd_compile.passes.graph import (
    Evaluator,
    argument,
    aten,
    call,
    inserting_for,
    output,
    refuse,
    token_dims,
    token_symbol,
)


class RestoreAllLogits:
    """Undo "logits of the last position only", and make the output `logits[1, T, V]`.

    Code written for plain decoding often slices the hidden states to the last token before the LM head. Verification
    needs a logit wherever a draft was made; `select_logits` later picks exactly those.

        before:  %last = slice(%hidden[1,T,H], 1, -1, maxint); %logits = linear(%last[1,1,H], %head)
        after:   %logits = linear(%hidden[1,T,H], %head)
    """

    name = "restore_all_logits"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Remove the slice before the LM head; returns 1 if there was one.

        Raises:
            UnsupportedModelError: the logits are neither of all tokens nor of the last.
        """
        graph = graph_module.graph
        symbol = token_symbol(graph)
        result = output(graph)
        logits = result.args[0]
        assert isinstance(logits, fx.Node)
        if token_dims(logits, symbol):
            return self._flatten(graph, logits, result)
        node = logits
        while True:
            sources = [n for n in node.all_input_nodes if n.op == "call_function"]
            if not sources:
                raise refuse(logits, "the logits do not depend on the tokens")
            if token_dims(sources[0], symbol):
                break
            node = sources[0]
        if not _takes_last(graph_module, node, sources[0]):
            raise refuse(node, "the logits are neither those of every token nor those of the last")
        source = sources[0]
        if node.target == aten.select.int:  # the dimension is gone after it: go on with [T, H]
            with inserting_for(node):
                source = call(graph, aten.squeeze.dim, source, 0)
        node.replace_all_uses_with(source)
        if node.target == aten.select.int:
            last, size = argument(result, 0), logits.meta["val"].shape[-1]
            with graph.inserting_before(result):
                result.args = (graph.call_function(aten.reshape.default, (last, [1, -1, size])),)
        return 1

    def _flatten(self, graph: fx.Graph, logits: fx.Node, result: fx.Node) -> int:
        value = logits.meta["val"]
        if value.dim() == 3:
            return 0
        with graph.inserting_before(result):
            result.args = (call(graph, aten.reshape.default, logits, [1, -1, value.shape[-1]]),)
        return 1

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The output is [.., T, V] with T symbolic."""
        logits = output(graph_module.graph).args[0]
        assert isinstance(logits, fx.Node)
        if len(token_dims(logits, token_symbol(graph_module.graph))) != 1:
            raise refuse(logits, "the logits have no token dimension")


def _takes_last(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    dim = token_dims(source, token_symbol(graph_module.graph))[0]
    if node.target == aten.select.int:
        return node.args[1:] == (dim, -1)
    if node.target == aten.slice.Tensor:
        start, end = node.args[2], node.args[3] if len(node.args) > 3 else None
        return bool(node.args[1] == dim and start == -1 and end in (None, sys.maxsize))
    if node.target == aten.index.Tensor:
        indices = node.args[1]
        assert isinstance(indices, (list, tuple))
        if len(indices) != dim + 1 or any(i is not None for i in indices[:dim]):
            return False
        index = Evaluator(graph_module, 5)(indices[dim])  # type: ignore[arg-type]
        return torch.equal(index.flatten(), index.new_tensor([-1]))
    return False
