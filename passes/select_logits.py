"""Run the LM head only where a logit is needed."""

from __future__ import annotations

import torch
from torch import fx

from emssd_compile.passes.graph import (
    aten,
    call,
    data_dependent,
    inserting_for,
    output,
    placeholder,
    refuse,
    token_dims,
    token_symbol,
)

_HEADS = frozenset({aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default})


class SelectLogits:
    """Pick the packed rows that need a logit before the LM head, and return the hidden states beside the logits.

    A prompt's tokens need no logits but the last; the head is the largest single product of a small model. Hidden
    states (the head's input) are what draft heads read.

        before:  %logits[1,T,V] = linear(%h[1,T,H], %head); return %logits
        after:   %logits[R,V] = linear(index_select(%h, 1, %logit_index[R]), %head); return %h[T,H], %logits
    """

    name = "select_logits"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Move the selection of tokens before the LM head; returns 1.

        Raises:
            UnsupportedModelError: the logits do not come out of one linear layer.
        """
        graph = graph_module.graph
        symbol = token_symbol(graph)
        (logits,) = output(graph).args
        assert isinstance(logits, fx.Node)
        head, after = find_head(graph, logits)
        source = head.args[1] if head.target == aten.addmm.default else head.args[0]
        assert isinstance(source, fx.Node)
        (dim,) = token_dims(source, symbol)
        for node in after:
            _forget_token_count(node)
        with inserting_for(head):
            selected = call(graph, aten.index_select.default, source, dim, placeholder(graph, "logit_index"))
            hidden = call(graph, aten.reshape.default, source, [-1, source.meta["val"].shape[-1]])
        head.replace_input_with(source, selected)
        result = output(graph)
        with graph.inserting_before(result):
            flat = graph.call_function(aten.reshape.default, (logits, [-1, logits.meta["val"].shape[-1]]))
        result.args = ((hidden, flat),)
        return 1


def find_head(graph: fx.Graph, logits: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The linear layer that makes the logits, and the token-local chain between it and them.

    Raises:
        UnsupportedModelError: they do not come out of one linear layer.
    """
    dependent, node = data_dependent(graph), logits
    after: list[fx.Node] = []
    while node.target not in _HEADS:
        sources = [n for n in node.all_input_nodes if n in dependent]
        if len(sources) != 1:
            raise refuse(node, "the logits do not come out of one linear layer", "end the forward with an LM head")
        after.append(node)
        node = sources[0]
    return node, after


def _forget_token_count(node: fx.Node) -> None:
    """A reshape behind the head may name T; R rows pass there now."""
    if node.target == aten.reshape.default:
        sizes = [
            -1 if isinstance(s, fx.Node) and isinstance(s.meta["val"], torch.SymInt) else s
            for s in node.args[1]  # type: ignore[union-attr]
        ]
        node.args = (node.args[0], sizes)
