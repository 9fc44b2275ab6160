"""Drafters that do not fit a target are refused with the reason before anything of it is captured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import emssd_compile
from emssd_compile.compiler import compile_model
from emssd_compile.drafters import (
    HEADS,
    MTP,
    BlockDrafter,
    Drafter,
    DraftHead,
    Eagle3,
    EarlyExit,
    Hybrid,
    Medusa,
    MLPSpeculator,
    ParallelEagle,
    PromptLookup,
)
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.medusa_config import MedusaConfig
from emssd_compile.drafters.mlp_speculator import MLPSpeculatorConfig
from emssd_compile.errors import DrafterError, EmssdError, OptionError
from emssd_compile.length import declared_sizes
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import TargetSizes
from emssd_compile.training.train import Texts, train
from tests.drafters.contexts import target_of
from tests.passes.graphs import HIDDEN as PLAIN_HIDDEN
from tests.passes.graphs import VOCABULARY as PLAIN_VOCABULARY
from tests.passes.graphs import TinyModel, causal
from tests.training.toys import TEXT, Characters, options
from tests.zoo import VOCABULARY, toy_model

HIDDEN, LAYERS, LENGTH = 64, 2, 48
SHORT = replace(LayerSizes.as_wide_as(HIDDEN), longest=32)
WITH_LAYERS = (MTP, BlockDrafter, Eagle3, ParallelEagle)


def head(kind: type[DraftHead], hidden_size: int = HIDDEN, vocabulary: int = VOCABULARY, **sizes: Any) -> DraftHead:
    layers = 2 if "taps" in sizes or kind in WITH_LAYERS else 8
    made = target_of(None, 1, LENGTH, vocabulary, hidden_size)
    return kind.for_target(replace(made, num_layers=layers), **sizes)


@pytest.fixture
def never_captured(monkeypatch) -> None:
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))


def refused(drafter: Drafter, error: type[EmssdError], said: str, model: nn.Module | None = None) -> None:
    with pytest.raises(error, match=said):
        emssd_compile.optimize(model or toy_model("llama"), drafter, max_length=LENGTH, backend="eager")


@pytest.mark.usefixtures("never_captured")
@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.kind)
def test_a_head_for_another_width_or_vocabulary(kind):
    refused(
        head(kind, hidden_size=32), DrafterError, rf"the {kind.__name__} was made for hidden states of size 32; .* 64"
    )
    refused(head(kind, vocabulary=1000), DrafterError, rf"predicts 1000 tokens and the target {VOCABULARY}")


@pytest.mark.usefixtures("never_captured")
@pytest.mark.parametrize("kind", [kind for kind in WITH_LAYERS if kind is not MTP], ids=lambda kind: kind.kind)
@pytest.mark.parametrize("taps", [(0, 5), (2,)])
def test_a_head_that_reads_layers_that_are_not_there(kind, taps):
    refused(head(kind, taps=taps), OptionError, rf"output of layer {taps[-1]} was asked for; the model has 2 layers")


@pytest.mark.usefixtures("never_captured")
@pytest.mark.parametrize("kind", WITH_LAYERS, ids=lambda kind: kind.kind)
def test_a_head_whose_positions_do_not_reach_as_far_as_rows_do(kind):
    said = rf"the {kind.__name__} was made for 32 positions, .*, and rows have up to 48 tokens: pass max_length=32"
    refused(head(kind, layer=SHORT), DrafterError, said)


@pytest.mark.usefixtures("never_captured")
@pytest.mark.parametrize(
    ("drafter", "error", "said"),
    [
        (
            lambda: Medusa(MedusaConfig(HIDDEN, VOCABULARY), tree=((VOCABULARY + 3,),)),
            DrafterError,
            "draft lower ranks",
        ),
        (
            lambda: MLPSpeculator(MLPSpeculatorConfig(HIDDEN, VOCABULARY), tree=(VOCABULARY + 1,)),
            DrafterError,
            "draft fewer",
        ),
        (lambda: EarlyExit((0, 2), 3), OptionError, r"EarlyExit layers=\[0, 2\]: the model has layers 0 to 1 only"),
        (lambda: Hybrid(PromptLookup(3), head(MLPSpeculator, 32)), DrafterError, "hidden states of size 32"),
        (lambda: Hybrid(head(Eagle3, taps=(4,)), PromptLookup(3)), OptionError, "layer 4 was asked for"),
    ],
    ids=["medusa", "mlp", "early exit", "second of two", "first of two"],
)
def test_other_reasons(drafter, error, said):
    refused(drafter(), error, said)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma"])
def test_what_a_model_says_of_itself_is_what_is_captured_of_it(architecture):
    model = toy_model(architecture)
    said, captured = declared_sizes(model, 2, LENGTH), compile_model(model, BatchShape(2, LENGTH)).target(None)  # type: ignore[arg-type]
    assert said == TargetSizes(2, LENGTH, captured.vocabulary, captured.hidden_size, captured.num_layers)


def test_a_model_that_says_nothing_is_looked_at_when_it_is_captured():
    model = TinyModel(attend=causal).eval()
    assert declared_sizes(model, 1, LENGTH) is None
    refused(head(MLPSpeculator, PLAIN_HIDDEN + 2, PLAIN_VOCABULARY), DrafterError, "hidden states of size", model)


@pytest.mark.parametrize(
    ("kind", "sizes", "error", "said"),
    [
        (Eagle3, {"taps": (9,)}, OptionError, "layer 9 was asked for; the model has 2 layers"),
        (Medusa, {"num_heads": 0}, OptionError, "num_heads=0 is out of range"),
        (MLPSpeculator, {"depth": 1}, OptionError, "no size 'depth'"),
        (BlockDrafter, {"layer": replace(SHORT, longest=8)}, DrafterError, "made for 8 positions"),
    ],
    ids=["taps", "out of range", "unknown", "positions"],
)
def test_what_cannot_be_trained_for_a_target_is_refused_before_any_work(
    kind, sizes, error, said, tmp_path, monkeypatch
):
    monkeypatch.setattr("emssd_compile.training.train.FrozenTarget", None)
    texts, out = Texts([TEXT], [], Characters()), Path(tmp_path / "out")
    with pytest.raises(error, match=said):
        train(toy_model("llama"), kind, texts, out, options(sizes=sizes))
    assert not out.exists()
