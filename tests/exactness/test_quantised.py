"""Quantised targets, on every backend and target: the tokens are those of the quantised model's own decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import emssd_compile
from emssd_compile.decoder import Decoder
from emssd_compile.drafters import PromptLookup
from emssd_compile.errors import OptionError, StaleModelError
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.passes import linear_rule, register_token_rule, token_rules
from tests.exactness.models import Reference
from tests.export.subjects import Small, prompt
from tests.quantised import Int4Linear, Int8Weight, nearest, with_layers, with_weights

NEW = 24
PROMPTS = [prompt(n) for n in (1, 2, 7, 30, 61)]  # more than there are rows
KINDS: dict[str, Callable[[nn.Module], None]] = {
    "wrapped weights": with_weights,
    "layers that write weights out": with_layers,
    "integers of four bits": partial(with_layers, kind=Int4Linear),
}
CASES = [
    *((kind, "eager") for kind in KINDS),
    ("wrapped weights", "paged"),
    ("wrapped weights", "inductor"),
    ("wrapped weights", "onnx"),
    *(pytest.param(kind, "inductor", marks=pytest.mark.long) for kind in [*KINDS][1:]),
    pytest.param("wrapped weights", "aot", marks=pytest.mark.long),
]


def quantised(kind: str) -> nn.Module:
    model = Small()
    KINDS[kind](model)
    return model


def optimized(model: nn.Module, **options: Any) -> OptimizedModel:
    given = {"backend": "eager", "layout": "packed", "max_batch": 3, "max_length": 128, "prefill_chunk": 24, **options}
    return emssd_compile.optimize(model, PromptLookup(4), **given)


def decoder(model: nn.Module, target: str, folder: Path) -> Decoder:
    if target in ("eager", "inductor"):
        return optimized(model, backend=target)
    if target == "paged":
        return optimized(model, memory="paged", kv_tokens=320)
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # to be quick
        getattr(optimized(model), f"export_{target}")(folder)
    return emssd_compile.load(folder)


@pytest.mark.parametrize(("kind", "target"), CASES)
def test_tokens_are_the_models_own(kind, target, tmp_path):
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    model = quantised(kind)
    reference = Reference(model)
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    fast = decoder(model, target, tmp_path)
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert fast.stats.num_accepted_draft_tokens > 0


def test_the_compiled_step_reads_integers():
    model = quantised("wrapped weights")
    fast = optimized(model, backend="inductor")
    step: Any = fast._engine.variant.step
    products = [node for node in step.graph_module.graph.nodes if "grouped_linear" in str(node.target)]
    dtypes = {weight.meta["val"].dtype for node in products for weight in node.args[1]}
    assert dtypes == {torch.int8}


def _write(model: Any) -> None:
    model.q.weight.integers.neg_()


def _replace(model: Any) -> None:
    model.q.weight = nn.Parameter(Int8Weight.of(torch.randn(model.q.weight.shape)), requires_grad=False)


@pytest.mark.parametrize("change", [_write, _replace])
def test_weights_are_followed(change):
    model = quantised("wrapped weights")
    fast = optimized(model)
    before = fast.generate(PROMPTS, max_new_tokens=NEW)
    change(model)
    after = fast.generate(PROMPTS, max_new_tokens=NEW)
    assert after == [[*ids, *Reference(model)(ids, NEW)] for ids in PROMPTS] != before


def test_a_scale_that_two_weights_have_in_common_is_followed_or_refused():
    model: Any = quantised("wrapped weights")
    model.k.weight.scale = model.q.weight.scale
    fast = optimized(model)
    fast.generate(PROMPTS, max_new_tokens=NEW)
    model.q.weight.scale.mul_(1.5)
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == [[*ids, *Reference(model)(ids, NEW)] for ids in PROMPTS]
    _replace(model)
    with pytest.raises(StaleModelError, match=r"weight\.scale was one tensor in several places, and is several now"):
        fast.generate(PROMPTS, max_new_tokens=NEW)


def test_another_kind_of_weight_is_refused():
    model: Any = quantised("wrapped weights")
    fast = optimized(model)
    model.q.weight = nn.Parameter(torch.randn(model.q.weight.shape))
    with pytest.raises(StaleModelError, match=r"q\.weight\.integers is gone"):
        fast.generate(PROMPTS, max_new_tokens=NEW)


@torch.library.custom_op("emssd_tests::scaled_linear", mutates_args=())
def scaled_linear(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    return x @ (integers.to(x.dtype) * scale).T


@scaled_linear.register_fake
def _(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], integers.shape[0]))


class OwnLinear(nn.Module):
    """A layer with an op of its own, as libraries of quantised layers have."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        integers, scale = nearest(layer.weight)
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = scaled_linear(x, self.integers, self.scale)
        return result


def test_an_op_of_the_users_is_tested_and_with_a_rule_proved(monkeypatch):
    monkeypatch.setattr(token_rules, "RULES", {**token_rules.RULES})
    model = Small()
    with_layers(model, OwnLinear)
    expected = [[*ids, *Reference(model)(ids, NEW)] for ids in PROMPTS]
    for way in ("tested", "proved"):
        fast = optimized(model)
        assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
        (proof,) = [record for record in fast.explain().records if record.name == "prove_token_pointwise"]
        assert proof.notes[0].startswith(way)
        register_token_rule(torch.ops.emssd_tests.scaled_linear.default, linear_rule)


@pytest.mark.parametrize(
    ("op", "rule", "message"),
    [
        (torch.ops.emssd_tests.scaled_linear, linear_rule, "wants an op's overload"),
        (torch.ops.aten.linear.default, linear_rule, "there is a rule for aten.linear.default already"),
        (torch.ops.emssd_tests.scaled_linear.default, None, "wants a function"),
    ],
)
def test_rules_that_make_no_sense_are_refused(op, rule, message):
    with pytest.raises(OptionError, match=message):
        register_token_rule(op, rule)
