"""Which layers make blocks; what is done with these is tried in tests/lowering/test_regions.py."""

import pytest
import torch
from torch import fx, nn

from emssd_compile.ops import ragged_attention
from emssd_compile.passes.mark_regions import MarkRegions, Region, _blocks


@pytest.mark.parametrize(
    ("layers", "most", "expected"),
    [
        ("AAAAAA", 9, (0, 1, 6)),
        ("AAAAAA", 3, (0, 2, 3)),
        ("AAAAAAA", 3, (0, 2, 3)),
        ("ABABAB", 9, (0, 2, 3)),
        ("AAAAABAAAAABAA", 9, (0, 6, 2)),
        ("BAAAA", 9, (1, 1, 4)),
        ("A" * 30, 7, (0, 5, 6)),
        ("A" * 31, 7, (0, 5, 6)),
        ("ABCD", 9, (0, 4, 1)),
        ("A", 9, (0, 1, 1)),
    ],
)
def test_blocks_leave_as_few_layers_to_compile_as_they_can(layers, most, expected):
    """The first layer, the number of layers in a block, the number of blocks."""
    assert _blocks(layers, most) == expected


def _region(scale: float, order: str = "xy", size: int = 3) -> Region:
    """`(x + y) * scale`, of a view of a value from outside."""
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in "xy"}
    for node in given.values():
        node.meta["val"] = torch.empty(size, 2)
    flat = graph.call_function(torch.ops.aten.view.default, (given["x"], [-1]))
    flat.meta["val"] = torch.empty(2 * size)
    shaped = graph.call_function(torch.ops.aten.view.default, (flat, [size, 2]))
    other = {"x": shaped, "y": given["y"]}
    total = graph.call_function(torch.ops.aten.add.Tensor, tuple(other[name] for name in order))
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (total, scale))
    for node in (shaped, total, scaled):
        node.meta["val"] = torch.empty(size, 2)
    graph.output(scaled)
    return Region.of([total, scaled])


def test_regions_are_alike_if_they_compute_the_same_of_what_they_are_handed():
    assert _region(0.5).key() == _region(0.5).key()
    different = [_region(0.25), _region(0.5, "yx"), _region(0.5, "yy"), _region(0.5, size=4)]
    assert all(region.key() != _region(0.5).key() for region in different)


def test_views_of_what_is_outside_are_computed_anew():
    region = _region(0.5)
    assert [node.name for node in region.taken] == ["x", "y"]
    assert [node.target for node in region.nodes if node not in region.own] == [torch.ops.aten.view.default] * 2


@pytest.mark.parametrize(("added", "blocks"), [("aaaaaaaa", 4), ("abababab", 4), ("aaababab", 0)])
def test_layers_of_a_block_may_share_only_what_those_of_all_blocks_share(added, blocks):
    """Each layer alone does the same: it adds something from outside. Blocks are of two layers."""
    root, graph = nn.Module(), fx.Graph()
    root.weight = nn.Parameter(torch.empty(4))
    x, outside = graph.placeholder("x"), {name: graph.placeholder(name) for name in "ab"}
    weight = graph.get_attr("weight")
    for name in added:
        seen = graph.call_function(ragged_attention, (x, weight))
        x = graph.call_function(torch.ops.aten.add.Tensor, (seen, outside[name]))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4)
    graph.output({"x": x})
    graph_module = fx.GraphModule(root, graph)
    assert MarkRegions(bytes_per_call=4).run(graph_module) == blocks
    assert len({node.meta["region"] for node in graph.nodes if "region" in node.meta}) == blocks
    if added == "aaaaaaaa":  # of 16 bytes
        assert [MarkRegions(bytes_per_call=count).run(graph_module) for count in (10, 11)] == [2, 0]
