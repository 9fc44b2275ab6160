"""Leave out decoder layers: what is left is a smaller model that shares weights and caches with the whole one."""

from __future__ import annotations

from torch import fx

from emssd_compile.errors import OptionError
from emssd_compile.ops import append_kv
from emssd_compile.passes.graph import ancestors, inputs, output, results
from emssd_compile.passes.tap_features import layer_outputs


class KeepLayers:
    """Run some decoder layers of an L2 graph only, and the LM head on what the last of them gives.

    A model drafts for itself with its first layers (LayerSkip, 2404.16710) or without some in the middle (SWIFT,
    2410.06916). Whatever a layer that is left out would give, it is given what came in. Layers are found by structure
    (`tap_features`); caches of those that are left out are no inputs any more.

        before:  %h0 = layer 0; %h1 = layer 1(%h0); %h2 = layer 2(%h1); return %hidden, head(norm(%h2))
        after:   %h0 = layer 0; %h2 = layer 2(%h0); return %hidden, head(norm(%h2))          (layers 0 and 2)

    Args:
        layers: indices of the layers that run, ascending; layer 0 is one of them.
    """

    name = "keep_layers"

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Leave out the other layers; returns how many.

        Raises:
            UnsupportedModelError: it cannot be told what the layers are, or what each gives.
            OptionError: the model has no such layers.
        """
        graph = graph_module.graph
        result = output(graph)
        result.args = (results(graph)[:2],)  # no taps
        graph.eliminate_dead_code()
        outputs = layer_outputs(graph)
        count, kept = len(outputs), self.layers
        if list(kept) != sorted({*kept, 0} & set(range(count))):
            raise OptionError(
                f"layers {list(kept)} were asked for; the model has layers 0 to {count - 1}: name some of them in "
                "ascending order, layer 0 among them"
            )
        newest = outputs[0]
        for layer, node in enumerate(outputs[1:], 1):
            if layer in kept:
                newest = node
            else:
                node.replace_all_uses_with(newest)
        _drop_unread(graph)
        self.notes = (f"runs layers {list(kept)} of {count}",)
        return count - len(kept)


def _drop_unread(graph: fx.Graph) -> None:
    """Erase what no result is made of. What is appended to a cache that nobody reads is no reason to stay."""
    alive = ancestors(results(graph))
    appended = [n for n in graph.nodes if n.target == append_kv and not alive.isdisjoint(n.args[:2])]
    alive |= {*appended, *ancestors(appended), *(n for n in inputs(graph) if n.meta.get("role") != "cache")}
    for node in reversed(graph.nodes):
        if node.op != "output" and node not in alive:
            graph.erase_node(node)
