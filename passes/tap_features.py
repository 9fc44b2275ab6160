"""Return what the decoder layers compute."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from emssd_compile.errors import OptionError
from emssd_compile.ops import ragged_attention
from emssd_compile.passes.graph import (
    SHAPE_ONLY,
    ancestors,
    aten,
    call,
    data_dependent,
    output,
    placeholder,
    refuse,
    results,
    shape,
    token_dims,
    token_symbol,
)

_REMEDY = "keep the decoder layers in one nn.ModuleList, each a module that maps [1, T, H] to [1, T, H]"


class TapFeatures:
    """Return the outputs of decoder layers beside hidden states and logits.

    Draft heads read inner values of the target: EAGLE-3 those of an early, a middle and a late layer. The output of
    layer i is the residual stream behind it, `hidden_states[i + 1]` of Hugging Face. Of the last layer, Hugging Face
    gives what the final norm makes of it; here it is what goes into that norm.

    No name is known. A layer is what was computed in one numbered module of the list that holds the attentions. Its
    output is the one value `[1, T, H]` that leaves it on the way to the logits; keys and values that a later layer
    reads go into a cache, which is not on that way. All layers are checked, whichever are asked for.

    Args:
        taps: indices of layers; negative ones count from the end.

        before:  %h1[1,T,H] = add(%h0, %mlp); ...; return %hidden[T,H], %logits[R,V]
        after:   %tap[T,H] = reshape(%h1, [-1, H]); return %hidden, %logits, %tap
    """

    name = "tap_features"

    def __init__(self, taps: tuple[int, ...]) -> None:
        self.taps = taps
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Add the results; returns how many.

        Raises:
            UnsupportedModelError: it cannot be told what the layers are, or what each gives.
            OptionError: the model has no such layer.
        """
        graph = graph_module.graph
        outputs = layer_outputs(graph)
        for tap in self.taps:
            if not -len(outputs) <= tap < len(outputs):
                raise OptionError(f"the output of layer {tap} was asked for; the model has {len(outputs)} layers")
        result = output(graph)
        with graph.inserting_before(result):
            tapped = [
                call(graph, aten.reshape.default, node, [-1, node.meta["val"].shape[-1]])  # [T, H]
                for node in (outputs[tap] for tap in self.taps)
            ]
        result.args = ((*results(graph), *tapped),)
        named = ", ".join(f"{tap} (%{outputs[tap].name})" for tap in self.taps)
        self.notes = (f"tapped: outputs of layers {named}, of {len(outputs)}",)
        return len(tapped)


def layer_outputs(graph: fx.Graph) -> list[fx.Node]:
    """The output `[1, T, H]` of each decoder layer of an L2 graph, in order.

    Raises:
        UnsupportedModelError: the attentions lie in no list of layers, or a layer does not give one value to the next.
    """
    layer_of, count = _find_layers(graph)
    alive = ancestors(results(graph), values_only=True) & data_dependent(graph)
    leaving: list[list[fx.Node]] = [[] for _ in range(count)]
    for node in graph.nodes:
        layer = layer_of.get(node)
        if layer is not None and node in alive and any(u in alive and layer_of.get(u) != layer for u in node.users):
            leaving[layer].append(node)
    outputs = [_only(graph, layer, nodes) for layer, nodes in enumerate(leaving)]
    for layer, node in enumerate(outputs[:-1]):
        for user in node.users:
            if user in alive and layer_of.get(user, -1) < layer:
                raise refuse(user, f"it reads what layer {layer} gives, %{node.name}, and is of no later one", _REMEDY)
    if _bypassed(graph, outputs[-1]):
        raise refuse(outputs[-1], f"what layer {count - 1} gives is not all that the logits are made of", _REMEDY)
    return outputs


@dataclass(frozen=True)
class _Module:
    """A module around a node that is numbered, as those of a list are.

    Attributes:
        path: its qualified name, `"model.layers.3"`.
        call: the same for each node of one call.
        kind: its class.
    """

    path: str
    call: str
    kind: str

    @property
    def owner(self) -> str:
        """The list that it is in."""
        return self.path.rpartition(".")[0]

    @property
    def index(self) -> int:
        """Its place there."""
        return int(self.path.rpartition(".")[2])


def _numbered(node: fx.Node) -> list[_Module]:
    """The numbered modules that `node` was computed in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    found = [_Module(path, str(key), str(kind)) for key, (path, kind) in stack.items()]
    return [m for m in found if m.path.rpartition(".")[2].isdecimal()]


def _find_layers(graph: fx.Graph) -> tuple[dict[fx.Node, int], int]:
    """The layer of each node that is in one, and how many layers there are."""
    owner, kinds = _find_list([n for n in graph.nodes if n.target == ragged_attention])
    layer_of: dict[fx.Node, int] = {}
    calls: dict[int, str] = {}
    for node in graph.nodes:
        module = next((m for m in _numbered(node) if m.owner == owner), None)
        if module is None:
            continue
        if module.kind not in kinds:
            raise refuse(node, f"{module.path} holds no attention, nor do others of its class: is it a layer?", _REMEDY)
        if calls.setdefault(module.index, module.call) != module.call:
            raise refuse(node, f"layer {module.path} runs more than once: it has several outputs")
        layer_of[node] = module.index
    missing = set(range(max(calls) + 1)) - set(calls)
    if missing:
        raise refuse(output(graph), f"modules {sorted(missing)} of {owner} compute nothing: are they layers?", _REMEDY)
    return layer_of, len(calls)


def _find_list(sites: list[fx.Node]) -> tuple[str, set[str]]:
    """The list that holds the attentions, and the classes of those of its modules that hold one."""
    inner: dict[str, set[str]] = defaultdict(set)
    owners: set[str] = set()
    kinds: set[str] = set()
    for site in sites:
        modules = _numbered(site)
        if not modules:
            raise refuse(site, "no list of layers was found: this attention is in no numbered module", _REMEDY)
        outermost = modules[0]
        owners.add(outermost.owner)
        kinds.add(outermost.kind)
        inner[outermost.path].add(modules[1].path if len(modules) > 1 else "")
        if len(owners) > 1:
            raise refuse(site, f"the attentions are in several lists, {sorted(owners)}: which are layers?", _REMEDY)
        if len(inner[outermost.path]) > 1:
            raise refuse(site, f"{outermost.path} holds a list of attentions: which are layers?", _REMEDY)
    return owners.pop(), kinds


def _only(graph: fx.Graph, layer: int, leaving: list[fx.Node]) -> fx.Node:
    """The one value that leaves a layer, checked to be one vector a token."""
    if len(leaving) != 1:
        named = ", ".join(f"%{n.name}" for n in leaving) or "nothing"
        place = leaving[-1] if leaving else output(graph)
        raise refuse(place, f"layer {layer} does not give one value to those behind it, but {named}", _REMEDY)
    (node,) = leaving
    sizes = shape(node) or ()
    if token_dims(node, token_symbol(graph)) != (len(sizes) - 2,) or any(s != 1 for s in sizes[:-2]):
        raise refuse(node, f"the output of layer {layer} has shape {tuple(sizes)}, not [1, T, H]", _REMEDY)
    for user in node.users:
        if user.op == "call_function" and not user.meta.get("nn_module_stack"):
            raise refuse(user, f"it reads the output of layer {layer}, and it is not known which module it is of")
    return node


def _bypassed(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether token ids reach the results by a way that does not lead through `node`."""
    reached = {placeholder(graph, "input_ids")}
    for other in graph.nodes:
        if other is not node and other.target not in SHAPE_ONLY and not reached.isdisjoint(other.all_input_nodes):
            reached.add(other)
    return not reached.isdisjoint(results(graph))


__all__ = ["TapFeatures", "layer_outputs"]
