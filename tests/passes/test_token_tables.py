"""The target's embedding and LM head are found in its graph, whoever wrote the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import emssd_compile
from emssd_compile.compiler import compile_model
from emssd_compile.drafters import NoDrafter
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import Target, TokenTables
from tests.passes.graphs import HIDDEN, VOCABULARY, TinyModel, causal
from tests.zoo import toy_model


class Reads(NoDrafter):
    """Keeps what it is told of its target."""

    def prepare(self, target: Target) -> None:
        self.target = target


def _target(model: nn.Module) -> Target:
    return compile_model(model, BatchShape(2, 32)).target(lambda model, **sizes: None)  # type: ignore[arg-type]


def _tables(model: nn.Module) -> TokenTables:
    target = _target(model)
    assert (target.rows, target.capacity, target.dtype) == (2, 32, torch.float32)
    return target.tables


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3_text", "phi"])
def test_they_are_the_very_weights_of_the_model(architecture):
    model = toy_model(architecture)
    tables, head = _tables(model), model.get_output_embeddings()
    assert tables.embedding is model.get_input_embeddings().weight
    assert tables.head is head.weight
    assert tables.head_bias is head.bias


class _Written(nn.Module):
    """Looks up and multiplies by hand."""

    def __init__(self, multiply: str) -> None:
        super().__init__()
        self.inner, self.multiply = TinyModel(attend=causal), multiply
        self.other, self.head = nn.Embedding(VOCABULARY, HIDDEN), self.inner.lm_head
        self.inner.lm_head = nn.Identity()  # type: ignore[assignment]

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.inner(input_ids)
        if self.multiply == "two tables":
            hidden = hidden + self.other(input_ids)
        weight = 2 * self.head.weight if self.multiply == "computed" else self.head.weight
        return hidden @ weight.t()


@pytest.mark.parametrize(
    ("multiply", "has_embedding", "has_head"),
    [("turned", True, True), ("computed", True, False), ("two tables", False, True)],
)
def test_what_is_no_weight_or_not_the_only_one_is_not_said(multiply, has_embedding, has_head):
    model = _Written(multiply).eval()
    tables = _tables(model)
    assert tables.embedding is (model.inner.embed.weight if has_embedding else None)
    assert tables.head is (model.head.weight if has_head else None)
    assert tables.head_bias is None


def test_a_weight_that_is_replaced_is_found_again():
    model, other = toy_model("llama"), toy_model("llama", seed=1)
    reads = Reads()
    fast = emssd_compile.optimize(model, reads, max_length=32, backend="eager")
    before = reads.target.read_tables
    fast.generate([[1, 2]], max_new_tokens=2)
    model.load_state_dict(other.state_dict(), assign=True)
    fast.generate([[1, 2]], max_new_tokens=2)
    assert before().embedding is model.get_input_embeddings().weight
    again = _target(model)
    assert again.read_tables == before
    assert again.read_tables != _target(other).read_tables
