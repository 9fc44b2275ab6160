"""Cut a step into pieces, so that what repeats is compiled once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from emssd_compile.passes.graph import inputs, output
from emssd_compile.passes.mark_regions import Region, is_computed


@dataclass(frozen=True)
class Call:
    """One run of a piece. Values are numbered: the step's inputs first, then its weights, then what is computed.

    Attributes:
        piece: its number.
        taken: the numbers of what it is given, in order.
        returned: the numbers of what it returns, in order.
        dropped: the numbers of values that nothing needs any more.
    """

    piece: int
    taken: tuple[int, ...]
    returned: tuple[int, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """A step as calls of graphs.

    Attributes:
        graph_modules: the pieces; each returns a dict.
        calls: in order.
        weights: the names of the weights, in the order of their numbers.
        results: the numbers of the step's results, by name.
        num_values: how many numbers there are.
    """

    graph_modules: tuple[fx.GraphModule, ...]
    calls: tuple[Call, ...]
    weights: tuple[str, ...]
    results: dict[str, int]
    num_values: int


def cut(graph_module: fx.GraphModule) -> Pieces:
    """Cut a step along its regions (`mark_regions`); those of one kind are one piece. Without any it is all one.

    What a piece hands to others is contiguous, so that one that takes the place of another gets the same.

    Args:
        graph_module: a step, with results by name.
    """
    graph = graph_module.graph
    results = output(graph).args[0]
    assert isinstance(results, dict)
    regions: list[tuple[Hashable, Region]] = []  # with the names of their pieces
    computed = [node for node in graph.nodes if is_computed(node)]
    for mark, nodes in groupby(computed, lambda node: node.meta.get("region")):
        regions.append((("region", mark[0]) if mark else len(regions), Region.of(list(nodes))))

    needed = {*results.values(), *(node for _, region in regions for node in region.taken)}
    sizes: dict[Hashable, int] = {}
    places = defaultdict[Hashable, set[int]](set)  # in each piece, of nodes whose values are needed
    for name, region in regions:
        assert len(region.nodes) == sizes.setdefault(name, len(region.nodes)), "those of one kind have the same nodes"
        kept = needed & region.own
        places[name] |= {place for place, node in enumerate(region.nodes) if node in kept}
    numbers = {name: number for number, name in enumerate(places)}
    graph_modules = {name: _piece(region, places[name]) for name, region in reversed(regions)}

    weights = list(dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")))
    values = {node: number for number, node in enumerate(inputs(graph))}
    first = len(values)
    values |= {n: first + weights.index(str(n.target)) for n in graph.find_nodes(op="get_attr")}
    count = first + len(weights)
    calls = []
    for name, region in regions:
        returned = [region.nodes[place] for place in sorted(places[name])]
        values |= {node: count + index for index, node in enumerate(returned)}
        taken = tuple(values[node] for node in region.taken)
        calls.append(Call(numbers[name], taken, tuple(range(count, count + len(returned))), ()))
        count += len(returned)
    held = {values[node] for node in results.values()}
    return Pieces(
        tuple(graph_modules[name] for name in numbers),
        tuple(_dropping(calls, held, first + len(weights))),
        tuple(weights),
        {str(name): values[node] for name, node in results.items()},
        count,
    )


def _dropping(calls: list[Call], held: Collection[int], first: int) -> list[Call]:
    """The calls, each dropping what none after it takes; `first` is the first number of what is computed."""
    seen = set(held)
    found = []
    for call in reversed(calls):
        last = {number for number in (*call.taken, *call.returned) if number >= first} - seen
        seen |= last
        found.append(Call(call.piece, call.taken, call.returned, tuple(sorted(last))))
    return found[::-1]


def _piece(region: Region, places: Collection[int]) -> fx.GraphModule:
    """The graph of a region; it returns the nodes at these places."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(region.taken):
        copies[node] = graph.placeholder(f"taken_{number}_{node.name}")
        value = node.meta["val"]
        copies[node].meta = {**node.meta, "val": value if node.op != "call_function" else value.new_empty(value.shape)}
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    returned = {}
    for place in sorted(places):
        node = region.nodes[place]
        returned[str(place)] = copies[node]
        if not node.meta["val"].is_contiguous():
            kwargs: dict[str, Any] = {"memory_format": torch.contiguous_format}
            returned[str(place)] = graph.call_function(torch.ops.aten.clone.default, (copies[node],), kwargs)
    graph.output(returned)
    return fx.GraphModule(nn.Module(), graph, class_name="Piece")
