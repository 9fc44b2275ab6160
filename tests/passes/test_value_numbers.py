"""`value_numbers`: equal numbers are equal values, and what might differ has a number of its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from emssd_compile.capture import capture
from emssd_compile.passes.graph import aten, output
from emssd_compile.passes.value_numbers import ValueNumbers
from tests.passes.graphs import TinyModel


def _numbered(local: Callable[[TinyModel, Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Numbers of two values of a forward that are added to its hidden states."""
    model = TinyModel(lambda m, x, ids: sum(local(m, x, ids), x))
    graph = capture(model).graph
    last = output(graph).args[0].args[0]  # type: ignore[union-attr]
    assert isinstance(last, fx.Node)
    numbers = ValueNumbers()
    first, second = last.args[0].args[1], last.args[1]  # type: ignore[union-attr]
    return numbers(first), numbers(second)  # type: ignore[arg-type]


def _count(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None]


ALIKE = {
    "computed twice": lambda m, x, ids: (_count(x) + 1, _count(x) + 1),
    "of one table": lambda m, x, ids: (m.table[: x.shape[1]] * 2, m.table[: x.shape[1]] * 2),
    "of the shapes of two tensors": lambda m, x, ids: (torch.zeros_like(x + 1), torch.zeros_like(x * 2)),
}
OTHERS = {
    "another number": lambda m, x, ids: (_count(x) + 1, _count(x) + 2),
    "a number of another type": lambda m, x, ids: (_count(x) + 1, _count(x) + 1.0),
    "another op": lambda m, x, ids: (_count(x) + 1, _count(x) - 1),
    "operands the other way round": lambda m, x, ids: (_count(x) - x, x - _count(x)),
    "another table": lambda m, x, ids: (m.table[: x.shape[1]] * 2, m.tril[: x.shape[1], :16] * 2),
    "random numbers": lambda m, x, ids: (torch.rand_like(x), torch.rand_like(x)),
    "another shape": lambda m, x, ids: (torch.zeros_like(x), torch.zeros_like(x[..., :1])),
}


@pytest.mark.parametrize("local", ALIKE.values(), ids=ALIKE)
def test_what_is_computed_alike_has_one_number(local):
    first, second = _numbered(local)
    assert first == second


@pytest.mark.parametrize("local", OTHERS.values(), ids=OTHERS)
def test_what_may_differ_has_a_number_of_its_own(local):
    first, second = _numbered(local)
    assert first != second


def test_where_nodes_stand_for_something_the_ways_from_there_are_compared():
    graph = capture(TinyModel(lambda m, x, ids: x.sin() * 2 + x.cos() * 2)).graph
    sin, cos = (next(n for n in graph.nodes if n.target == op.default) for op in (aten.sin, aten.cos))
    first, second = (next(iter(node.users)) for node in (sin, cos))
    numbers = ValueNumbers()
    assert numbers(first) != numbers(second)
    assert numbers.where({sin: "scores"})(first) == numbers.where({cos: "scores"})(second)
    assert numbers.where({sin: "scores"})(first) != numbers.where({cos: "others"})(second)
    assert numbers.where({sin: "scores"})(first) != numbers(first)
