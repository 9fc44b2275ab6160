"""Exported programs: any sizes, the graph's own names, the graph's own weights."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx, nn

from emssd_compile.drafters import PromptLookup
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.export.program import exported_program
from emssd_compile.passes.graph import inputs
from emssd_compile.step.signature import SIZE_NAMES
from tests.passes.graphs import BATCH, VOCABULARY, model_with_attention, step_of, unpadded

STATE = {
    "history": torch.randint(VOCABULARY, (BATCH.rows, BATCH.capacity), generator=torch.Generator().manual_seed(0)),
    "known": torch.tensor([9, 20, 4]),
    "lengths": torch.tensor([8, 0, 3]),
    "draft_lengths": torch.tensor([3, 0, 0]),
    "draft_tokens": torch.randint(VOCABULARY, (BATCH.rows, 3), generator=torch.Generator().manual_seed(1)),
    "active": torch.ones(BATCH.rows, dtype=torch.bool),
    "limits": torch.full((BATCH.rows,), 50),
}
"""Two rows that decode, with three drafts and none, and one that reads its prompt."""


@functools.cache
def _step() -> tuple[fx.GraphModule, torch.export.ExportedProgram]:
    step = step_of(PromptLookup(3))
    return step, exported_program(step)


@functools.cache
def _model() -> tuple[fx.GraphModule, torch.export.ExportedProgram]:
    graph_module, _ = unpadded(model_with_attention())
    return graph_module, exported_program(graph_module)


def _values(graph_module: fx.GraphModule, given: dict[str, Tensor]) -> list[Tensor]:
    """`given`, and zeros for the inputs that it does not name."""
    values = []
    for node in inputs(graph_module.graph):
        name, fake = str(node.target), node.meta["val"]
        values.append(given[name].clone() if name in given else torch.zeros(fake.shape, dtype=fake.dtype))
    return values


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes", [(40, 6, 9, 20), (25, 25, 25, 25), (5, 4, 1, 5), (1, 1, 1, 1), (2, 1, 7, 1), (64, 63, 61, 62)]
)
def test_a_step_of_any_sizes_is_the_graph_s(sizes):
    step, program = _step()
    slots = dict(zip(SIZE_NAMES, map(torch.arange, sizes), strict=True))
    ours, theirs = _values(step, STATE | slots), _values(step, STATE | slots)
    expected, results = step(*ours), program.module()(*theirs)
    assert list(results) == list(expected)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
    for node, a, b in zip(inputs(step.graph), ours, theirs, strict=True):
        assert torch.equal(a, b), f"{node.target} was changed otherwise"


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "logits"), [(1, 1), (2, 1), (1, 2), (4, 4), (61, 63), (70, 3)])
def test_a_forward_of_any_sizes_is_the_graph_s(tokens, logits):
    graph_module, program = _model()
    given = {
        "input_ids": torch.arange(tokens) % VOCABULARY,
        "positions": torch.arange(tokens).clamp(max=BATCH.capacity - 1),
        "row_ids": torch.where(torch.arange(tokens) < BATCH.capacity, 1, BATCH.rows),
        "offsets": torch.tensor([0, 0, *[min(tokens, BATCH.capacity)] * 2]),
        "lengths": torch.zeros(BATCH.rows, dtype=torch.int64),
        "logit_index": torch.arange(logits) % tokens,
    }
    expected = graph_module(*_values(graph_module, given))
    results = program.module()(*_values(graph_module, given))
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_dimensions_of_one_symbol_are_one_dimension():
    _, program = _model()
    shapes = {n.name: n.meta["val"].shape for n in program.graph.nodes if n.op == "placeholder"}
    tokens = shapes["input_ids"][0].node.expr
    assert [shapes[name][0].node.expr for name in ("positions", "row_ids")] == [tokens, tokens]
    assert shapes["logit_index"][0].node.expr != tokens
    assert len(program.range_constraints) == 2


def test_inputs_keep_their_names_and_order():
    for graph_module, program in (_step(), _model()):
        assert list(program.graph_signature.user_inputs) == [n.target for n in inputs(graph_module.graph)]


def test_weights_are_shared():
    step, program = _step()
    ours = {t.data_ptr() for t in step.parameters()} | {t.data_ptr() for t in step.buffers()}
    theirs = {t.data_ptr() for t in (*program.state_dict.values(), *program.constants.values())}
    assert theirs <= ours
    assert len(theirs) >= 5


def test_a_graph_that_decides_by_a_size_is_refused():
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": torch.cat([x, x.new_zeros(3)]) + torch.arange(11)}

    graph_module = fx.symbolic_trace(Branches())
    step, _ = _step()
    slots = next(n for n in inputs(step.graph) if n.target == "token_range")
    inputs(graph_module.graph)[0].meta["val"] = slots.meta["val"]
    with pytest.raises(UnsupportedModelError, match="cannot be exported for all sizes"):
        exported_program(graph_module)
