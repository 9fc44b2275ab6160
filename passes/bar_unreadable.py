"""Bar tokens that the model could emit but not read."""

from __future__ import annotations

from torch import fx

from emssd_compile.passes.graph import argument, aten, call, output, placeholder, shape

_VIEWS = frozenset({aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints})


class BarUnreadable:
    """Cut the logits to the token ids that every embedding takes.

    A head is often padded to a round number of tokens. An id beyond the embedding has no vector: a model that emits one
    cannot go on. So it is never emitted here, and the vocabulary of the compiled model is the embedding's.

        before:  %x = embedding(%w[100,H], %input_ids); %logits[1,T,128] = linear(%h, %head[128,H]); return %logits
        after:   %barred[1,T,100] = slice(%logits, 2, 0, 100); return %barred
    """

    name = "bar_unreadable"

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Cut them, if there are any."""
        result = output(graph_module.graph)
        logits = result.args[0]
        assert isinstance(logits, fx.Node)
        emitted, read = int(logits.meta["val"].shape[-1]), readable(graph_module.graph)
        if read is None or read >= emitted:
            return 0
        with graph_module.graph.inserting_before(result):
            result.args = (call(graph_module.graph, aten.slice.Tensor, logits, 2, 0, read),)
        self.notes = (f"barred: tokens {read} to {emitted - 1}, which the embedding cannot take, are never emitted",)
        return 1


def readable(graph: fx.Graph) -> int | None:
    """How many token ids every table that is looked up by them holds; None if there is no such table."""
    tables: list[fx.Node] = []
    waiting = [placeholder(graph, "input_ids")]
    while waiting:
        ids = waiting.pop()
        for user in ids.users:
            if user.target in _VIEWS:
                waiting.append(user)
            elif user.target in (aten.embedding.default, aten.index.Tensor) and user.args[1] in (ids, [ids]):
                tables.append(argument(user, 0))
    rows = [(shape(table) or ())[0] for table in tables]
    return min((n for n in rows if isinstance(n, int)), default=None)
