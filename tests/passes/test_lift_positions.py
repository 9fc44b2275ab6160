"""`lift_positions`: what the model counts by itself comes from the input `positions`."""

import pytest
import torch
from torch import Tensor

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.lift_positions import LiftPositions
from emssd_compile.passes.prove_token_pointwise import ProveTokenPointwise
from tests.passes.graphs import LONGEST, TinyModel, apply, capture_and_apply, eager, run

_LONGEST = LONGEST - 2
"""Tokens of a row: positions with an offset of two still find their rows in the table."""


def _count(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def _rotary(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    angles = _count(x)[:, None].float() * torch.tensor([1.0, 0.5, 0.25, 0.125])
    angles = torch.cat([angles] * 4, -1)
    return x * angles.cos() + x.roll(1, -1) * angles.sin()


POSITIONS = {
    "arange": lambda m, x, ids: x + m.table[_count(x)],
    "arange with a batch dimension": lambda m, x, ids: x + m.table[_count(x)[None]],
    "cumulative sum of ones": lambda m, x, ids: x + m.table[torch.ones_like(ids).cumsum(1) - 1],
    "offset by two": lambda m, x, ids: x + m.table[_count(x) + 2],
    "offset inside the cumulative sum": lambda m, x, ids: x + m.table[torch.ones_like(ids).cumsum(1) + 1],
    "float positions": lambda m, x, ids: x * (1 + _count(x).float())[:, None].log(),
    "slice of a table": lambda m, x, ids: x + m.table[: x.shape[1]],
    "rotary angles": _rotary,
    "position of each head's bias": lambda m, x, ids: x + _count(x).view(1, -1, 1),
}


@pytest.mark.parametrize("local", POSITIONS.values(), ids=POSITIONS)
def test_positions_come_from_the_input(local):
    model = TinyModel(local)
    graph_module, records = capture_and_apply(model, DropNoops(), LiftPositions(_LONGEST))
    assert records[-1].changed >= 1
    torch.testing.assert_close(run(graph_module, 9), eager(model, 9), rtol=1e-6, atol=1e-6)
    # Two rows side by side: each token gets what it gets at its own position in its own row.
    order = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
    ids = torch.randint(32, (1, 9))
    packed = graph_module(ids, order[None])
    alone = torch.cat([model(ids[:, :5]), model(ids[:, 5:])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("local", POSITIONS.values(), ids=POSITIONS)
def test_a_second_run_changes_nothing(local):
    graph_module, _ = capture_and_apply(TinyModel(local), DropNoops(), LiftPositions(_LONGEST))
    (record,) = apply(graph_module, LiftPositions(_LONGEST))
    assert record.changed == 0


UNTOUCHED = {
    "constants along the tokens": lambda m, x, ids: x + torch.ones(x.shape[1])[:, None],
    "a table as long as a text could be": lambda m, x, ids: x @ m.table.T @ m.table,
    "token ids": lambda m, x, ids: x + m.table[ids],
}


@pytest.mark.parametrize("local", UNTOUCHED.values(), ids=UNTOUCHED)
def test_what_is_no_position_stays(local):
    model = TinyModel(local)
    graph_module, records = capture_and_apply(model, DropNoops(), LiftPositions(_LONGEST))
    assert records[-1].changed == 0
    torch.testing.assert_close(run(graph_module, 9), eager(model, 9), rtol=1e-6, atol=1e-6)


OTHER = {
    "every second number": lambda m, x, ids: x + torch.arange(0, 2 * x.shape[1], 2)[:, None],
    "the last rows of a table": lambda m, x, ids: x + m.table[-x.shape[1] :],
    "counted from the end": lambda m, x, ids: x + torch.arange(x.shape[1]).flip(0)[:, None],
}


@pytest.mark.parametrize("local", OTHER.values(), ids=OTHER)
def test_what_varies_along_the_tokens_but_is_no_position_is_refused_by_the_proof(local):
    graph_module = capture(TinyModel(local))
    with pytest.raises(UnsupportedModelError, match="shuffling the tokens changed their outputs") as caught:
        apply(graph_module, DropNoops(), LiftPositions(_LONGEST), ProveTokenPointwise(LONGEST))
    assert caught.value.node in {n.name for n in graph_module.graph.nodes}
