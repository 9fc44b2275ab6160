"""Find what repeats in a step: its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from emssd_compile.ops import ragged_attention
from emssd_compile.passes.graph import attribute, output

FEWEST_SAVED = 4  # layers that need not be compiled; fewer are not worth more pieces


class MarkRegions:
    """Mark blocks of layers that do the same with other weights, so that a target compiles them once.

    A layer is a run of nodes around one attention: from the place before it that the fewest values cross to that before
    the next one. Two are alike if their nodes are the same but for the values that come from outside. Blocks are as
    many layers as make few enough calls. The graph stays as it is; each node of a block has `meta["region"]`, its kind
    and its number. See `lowering.regions`.

        before:  %x1 = layer(%x0, %w0, %k0, %v0); ...; %x30 = layer(%x29, %w29, %k29, %v29)
        after:   the same, the nodes of the first five marked (0, 0), those of the last five (0, 5)

    Args:
        bytes_per_call: there is about one block for so many bytes of all the weights there are, or none.
    """

    name = "mark_regions"

    def __init__(self, bytes_per_call: int) -> None:
        self.bytes_per_call = bytes_per_call
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Mark blocks; returns how many."""
        self.notes = ()
        read = graph_module.graph.find_nodes(op="get_attr")
        weights = {str(node.target): attribute(graph_module, node).nbytes for node in read}
        most = round(sum(weights.values()) / self.bytes_per_call)
        if most < 2:
            return 0
        order = [node for node in graph_module.graph.nodes if is_computed(node)]
        layers = _keyed(order, _runs(order, output(graph_module.graph).all_input_nodes))
        marks: dict[fx.Node, tuple[int, int]] = {}
        for kind, sequence in enumerate(_sequences(layers)):
            start, size, number = _blocks([key for _, key in sequence], most)
            ends = range(start, start + size * number, size)
            blocks = [order[sequence[end][0].start : sequence[end + size - 1][0].stop] for end in ends]
            # layers of a block may share what those of another do not
            if size * (number - 1) < FEWEST_SAVED or len({_key(block) for block in blocks}) > 1:
                continue
            marks |= {node: (kind, place) for place, block in enumerate(blocks) for node in block}
            self.notes += (f"{number} x {size} layers are compiled once",)
        if not all(Region.of([*nodes]).is_portable for _, nodes in groupby(order, marks.get)):
            marks, self.notes = {}, ()  # what is between them could not be handed what it takes
        for node, mark in marks.items():
            node.meta["region"] = mark
        return len({*marks.values()})


def is_computed(node: fx.Node) -> bool:
    """Whether a node computes tensors. Sizes are told from tensors wherever they are needed."""
    return node.op == "call_function" and not isinstance(node.meta.get("val"), (int, torch.SymInt))


def is_view(node: fx.Node) -> bool:
    """Whether a node's result lies where an argument does: it costs nothing to have it twice."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    schema = getattr(node.target, "_schema", None)
    aliases = [result.alias_info for result in schema.returns] if schema else []
    return any(alias is not None and not alias.is_write for alias in aliases)


@dataclass
class Region:
    """Nodes, with all that they need from outside.

    Attributes:
        nodes: in order; sizes and views of what comes from outside are computed anew, before their first use.
        taken: what comes from outside, in the order of its first use.
        own: the nodes without those that are computed anew.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    taken: list[fx.Node] = field(default_factory=list)
    own: frozenset[fx.Node] = frozenset()

    @classmethod
    def of(cls, nodes: Sequence[fx.Node]) -> Region:
        """The region of these nodes of a graph."""
        own, seen = frozenset(nodes), set[fx.Node]()
        region = cls(own=own)

        def add(node: fx.Node) -> None:
            if node in seen:
                return
            seen.add(node)
            if node in own or is_view(node) or (node.op == "call_function" and not is_computed(node)):
                for source in node.all_input_nodes:
                    add(source)
                region.nodes.append(node)
            else:
                region.taken.append(node)

        for node in nodes:
            add(node)
        return region

    @property
    def is_portable(self) -> bool:
        """Whether its code can be handed what it takes: tensors, each of whose sizes is a number or a symbol."""
        values = [node.meta.get("val") for node in self.taken]
        return all(isinstance(value, Tensor) and all(map(_is_plain, value.shape)) for value in values)

    def key(self) -> tuple[Any, ...]:
        """Equal for regions that compute the same of what comes from outside."""
        names = {node: f"%own {place}" for place, node in enumerate(self.nodes)}
        names |= {node: f"%taken {place}" for place, node in enumerate(self.taken)}
        computed = (
            (str(node.target), repr(fx.node.map_arg((node.args, node.kwargs), names.__getitem__)), _form(node))
            for node in self.nodes
        )
        return (*map(_form, self.taken), *computed)


def _is_plain(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.expr.is_symbol or size.node.expr.is_number


def _form(node: fx.Node) -> str:
    """What is known of a value before it is computed."""
    value = node.meta.get("val")
    return f"{value.dtype} {value.device} {value.shape} {value.stride()}" if isinstance(value, Tensor) else ""


def _runs(order: Sequence[fx.Node], results: Collection[fx.Node]) -> list[slice]:
    """All nodes in runs, each around one attention."""
    places = [place for place, node in enumerate(order) if node.target == ragged_attention]
    late: set[fx.Node] = set()  # what is computed of an attention's result
    for node in order:
        if node.target == ragged_attention or not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    last = {source: place for place, user in enumerate(order) for source in user.all_input_nodes}
    last |= dict.fromkeys(results, len(order))
    changes = [0] * (len(order) + 2)  # of how many late values are computed before a place and used from there on
    for place, node in enumerate(order):
        if node in late:
            changes[place + 1] += 1
            changes[last.get(node, place) + 1] -= 1
    crossing = list(accumulate(changes))
    cuts = [0]
    for before, attention in pairwise(places):
        cut = min(range(before + 1, attention + 1), key=lambda place: (crossing[place], -place))
        while cut - 1 > before and order[cut - 1] not in late:
            cut -= 1
        cuts.append(cut)
    return [slice(*ends) for ends in pairwise([*cuts, len(order)])]


def _keyed(order: Sequence[fx.Node], runs: Iterable[slice]) -> list[tuple[slice, Any]]:
    """The runs with their keys; None for what cannot be handed its values.

    What comes before the first layer is in its run, and what comes behind the last one in that: where a run is like no
    other, and its beginning or its end is like others, these are cut off.
    """
    found = {(run.start, run.stop): _key(order[run]) for run in runs}
    common = {key for key, count in Counter(found.values()).items() if key is not None and count > 1}
    lengths = sorted({stop - start for (start, stop), key in found.items() if key in common}, reverse=True)
    keyed = []
    for (start, stop), key in found.items():
        ends = [] if key in common else [(start, start + n) for n in lengths] + [(stop - n, stop) for n in lengths]
        within = [(first, end) for first, end in ends if start <= first and end <= stop]
        fitting = ((slice(*part), same) for part in within if (same := _key(order[slice(*part)])) in common)
        keyed.append(next(fitting, (slice(start, stop), key)))
    return keyed


def _sequences(layers: Sequence[tuple[slice, Any]]) -> list[list[tuple[slice, Any]]]:
    """Layers that follow one another without anything between; those that are like no other are in none."""
    counts = Counter(key for _, key in layers)
    found: list[list[tuple[slice, Any]]] = [[]]
    for run, key in layers:
        if found[-1] and found[-1][-1][0].stop != run.start:
            found.append([])
        if key is None or counts[key] < 2:
            found.append([])
        else:
            found[-1].append((run, key))
    return [sequence for sequence in found if sequence]


def _blocks(keys: Sequence[Any], most: int) -> tuple[int, int, int]:
    """The first layer, the number of layers and the number of blocks that leave fewest layers to compile.

    Args:
        keys: of the layers.
        most: blocks.
    """
    best, fewest = (0, len(keys), 1), len(keys)
    for start in range(len(keys)):
        for size in range(1, (len(keys) - start) // 2 + 1):
            first, number = keys[start : start + size], 1
            while number < most and keys[start + number * size : start + (number + 1) * size] == first:
                number += 1
            left = len(keys) - size * (number - 1)
            if left < fewest:
                best, fewest = (start, size, number), left
    return best


def _key(nodes: Sequence[fx.Node]) -> Any:
    region = Region.of(nodes)
    return region.key() if region.is_portable else None
