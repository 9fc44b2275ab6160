"""Draft heads of every kind and their like, untrained and trained, in batches of several sizes, for three families of
targets: the tokens are the targets' own.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch._inductor.config

import emssd_compile
from emssd_compile.decoder import Decoder
from emssd_compile.drafters import HEADS
from emssd_compile.optimized_model import OptimizedModel
from tests.exactness.compiled import target
from tests.exactness.trained_heads import (
    BATCHES,
    CASES,
    FAMILIES,
    NEW,
    OTHERS,
    PROMPTS,
    ROWS,
    SAMPLING,
    SIZES,
    expected_texts,
    in_turn,
    make_drafter,
    prompts_for,
    teach,
)
from tests.zoo import toy_model

ALL = (*CASES, *OTHERS)
OFTEN = tuple((*batch, case) for batch, case in zip(itertools.cycle(zip(FAMILIES, BATCHES, strict=True)), ALL))
"""Tried each time: every case with one family and one size of batch, and so each of them. The others if --long."""


@functools.cache
def _drawn(family: str, rows: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of the prompts, and several texts of one of them, without drafts."""
    of = target(family, rows)
    plain = of.optimize(of.drafter("none"))
    several = plain.generate(PROMPTS[2:3], num_return_sequences=rows, **SAMPLING)
    return plain.generate(prompts_for(rows), **SAMPLING), several


@pytest.mark.parametrize(
    ("family", "rows", "case"),
    [
        pytest.param(*each, marks=() if each in OFTEN else pytest.mark.long)
        for each in itertools.product(FAMILIES, BATCHES, ALL)
    ],
)
def test_tokens_are_the_models_own(family, rows, case):
    """Untrained and trained, greedy and sampled: the weights of a drafter change under a step that is compiled."""
    prompts, texts = prompts_for(rows), expected_texts(family)
    expected = [texts[PROMPTS.index(ids)] for ids in prompts]
    drawn, several = _drawn(family, rows)
    drafter = make_drafter(family, case)
    fast = target(family, rows).optimize(drafter, prefill_chunk=24)
    assert fast.generate(prompts, **SAMPLING) == drawn
    fast.stats.reset()
    assert fast.generate(prompts, max_new_tokens=NEW) == expected
    assert fast.stats.num_draft_tokens > 0
    untrained = fast.stats.mean_acceptance_length
    teach(drafter, family)
    fast.stats.reset()
    assert fast.generate(prompts, max_new_tokens=NEW) == expected
    learns = case != "early-exit"
    assert fast.stats.mean_acceptance_length > max(1.5, untrained) or not learns, "accepted paths are decoded with, too"
    assert fast.generate(prompts, **SAMPLING) == drawn
    assert fast.generate(PROMPTS[2:3], num_return_sequences=rows, **SAMPLING) == several


@pytest.mark.parametrize(
    ("target_name", "cases"),
    [
        pytest.param("onnx", ("recurrent", "block-tree", "suffix-or-head", "early-exit"), id="onnx-few"),
        *(pytest.param(name, ALL, marks=pytest.mark.long, id=name) for name in ("onnx", "aot", "inductor")),
    ],
)
def test_compiled_and_as_an_artifact_they_make_the_same_drafts(target_name, cases, tmp_path):
    """Several in one step, since compiling one takes long; all if --long."""
    eager, expected = _eager_in_turn(cases), expected_texts(FAMILIES[0])
    if target_name == "onnx":
        pytest.importorskip("onnxruntime")
    decoder: Decoder
    if target_name == "inductor":
        decoder = emssd_compile.optimize(eager.model, in_turn(FAMILIES[0], cases), backend=target_name, **SIZES)
    else:
        with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # to be quick
            getattr(eager, f"export_{target_name}")(tmp_path / "artifact")
        decoder = emssd_compile.load(tmp_path / "artifact")
    for one in (eager, decoder):
        one.stats.reset()
        assert one.generate(PROMPTS, max_new_tokens=NEW) == expected
        assert one.stats.mean_acceptance_length > 1.5
    assert decoder.stats == eager.stats


@functools.cache
def _eager_in_turn(cases: tuple[str, ...]) -> OptimizedModel:
    family = FAMILIES[0]
    return emssd_compile.optimize(target(family, ROWS).model, in_turn(family, cases), backend="eager", **SIZES)


@pytest.mark.long
@pytest.mark.parametrize("case", ALL)
def test_engines_are_built_of_steps_with_heads(case, tmp_path):
    """Their attention is decomposed, for these head sizes have no kernel of TensorRT's.

    One by one: of all of them in one step TensorRT-RTX's builder ends the process.
    """
    pytest.importorskip("tensorrt_rtx")
    model = toy_model(FAMILIES[0]).to(torch.float16)
    fast = emssd_compile.optimize(model, in_turn(FAMILIES[0], (case,)), backend="eager", **SIZES)
    fast.export_tensorrt(tmp_path / "engine", compute_capabilities=["8.0"], attention="decomposed", check=False)
    assert (tmp_path / "engine" / "step.engine").stat().st_size > 2**20


def test_there_is_a_case_of_every_kind():
    assert {kind for kind, _, _ in CASES.values()} == {head.kind for head in HEADS}
