"""Run the LM head only where a logit is needed."""

from __future__ import annotations

import torch
from torch import fx

from emssd_compile.ops import attention
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
            UnsupportedModelError: the logits do not come out of an LM head.
        """
        graph = graph_module.graph
        symbol = token_symbol(graph)
        (logits,) = output(graph).args
        assert isinstance(logits, fx.Node)
        source, head = find_head(graph, logits)
        for node in head:
            _forget_token_count(node)
        for node in head:  # what else has the tokens, such as a term of their positions, is selected, too
            for each in node.all_input_nodes:
                if each not in head and token_dims(each, symbol):
                    with inserting_for(node):
                        (dim,) = token_dims(each, symbol)
                        selected = call(graph, aten.index_select.default, each, dim, placeholder(graph, "logit_index"))
                    for user in head:
                        user.replace_input_with(each, selected)
        with inserting_for(head[0]):
            hidden = call(graph, aten.reshape.default, source, [-1, source.meta["val"].shape[-1]])
        result = output(graph)
        with graph.inserting_before(result):
            flat = graph.call_function(aten.reshape.default, (logits, [-1, logits.meta["val"].shape[-1]]))
        result.args = ((hidden, flat),)
        return 1


def find_head(graph: fx.Graph, logits: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The hidden states that logits are computed of, and the LM head: all that computes them, in order.

    The head may be a linear layer, or what a quantised one is made of: it ends where all logits come out of one tensor
    and a matrix has been read.

    Raises:
        UnsupportedModelError: there is no such tensor behind the last attention.
    """
    dependent = data_dependent(graph)
    order = {node: place for place, node in enumerate(graph.nodes)}
    head, pending, has_matrix = list[fx.Node](), {logits}, False
    while True:
        node = max(pending, key=order.__getitem__)
        sources = [source for source in node.all_input_nodes if source in dependent]
        if not sources or node.target == attention:
            raise refuse(logits, "the logits do not come out of an LM head", "end the forward with a linear layer")
        head.insert(0, node)
        has_matrix |= any(_is_matrix(source) for source in node.all_input_nodes if source not in dependent)
        pending = pending - {node} | {*sources}
        (source, *others) = pending
        if has_matrix and not others and source.meta["val"].is_floating_point():
            return source, head


def _is_matrix(node: fx.Node) -> bool:
    """Whether it is as large for any number of tokens, in two dimensions or more."""
    value = node.meta["val"]
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    return all(isinstance(size, int) for size in sizes) and sum(size != 1 for size in sizes) > 1


def _forget_token_count(node: fx.Node) -> None:
    """A reshape behind the head may name T; R rows pass there now."""
    if node.target == aten.reshape.default:
        sizes = [
            -1 if isinstance(s, fx.Node) and isinstance(s.meta["val"], torch.SymInt) else s
            for s in node.args[1]  # type: ignore[union-attr]
        ]
        node.args = (node.args[0], sizes)
