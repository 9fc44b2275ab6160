"""Sampled texts are those that transformers' own list of logits processors leads to, drawn from with the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from transformers import GenerationConfig

import emssd_compile
from emssd_compile.decoder import Decoder
from emssd_compile.step.randomness import gumbels
from tests.export.subjects import VOCABULARY, Small, optimized, prompt
from tests.zoo import toy_model

NEW = 16
PROMPTS = [prompt(n) for n in (1, 5, 30, 12, 7, 9, 3, 21, 2, 11, 8)]
SEEDS = [*range(100, 100 + len(PROMPTS))]
ROWS: list[dict[str, Any]] = [
    {},  # greedy
    {"do_sample": True, "top_k": 0, "temperature": 0.7},
    {"do_sample": True, "temperature": 4.0},
    {"do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.6},
    {"do_sample": True, "temperature": 2.0, "top_p": 0.6, "renormalize_logits": True},
    {"do_sample": True, "temperature": 5.0, "top_h": 0.6},
    {"do_sample": True, "temperature": 3.0, "min_p": 0.2},
    {"do_sample": True, "temperature": 3.0, "typical_p": 0.3},
    {"do_sample": True, "temperature": 2.0, "epsilon_cutoff": 0.05},
    {"do_sample": True, "temperature": 4.0, "eta_cutoff": 0.9},
    {"do_sample": True, "temperature": 3.0, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 0.01},
]
OPTIONS: dict[str, Any] = {name: [row.get(name) for row in ROWS] for name in {name for row in ROWS for name in row}}


def _expected(ids: list[int], seed: int, options: dict[str, Any]) -> list[int]:
    model, text = Small(), list(ids)
    config = GenerationConfig(**{"top_k": 50, **options} if options else {})
    processors = toy_model("llama")._get_logits_processor(config, input_ids_seq_length=len(ids), device="cpu")
    for _ in range(NEW):
        with torch.no_grad():
            logits = processors(torch.tensor([text]), model(torch.tensor([text]))[:, -1])
        noise = gumbels(torch.tensor([[seed]]), torch.tensor([[len(text)]]), torch.arange(VOCABULARY))
        text.append(int((logits + noise if options else logits).argmax()))
    return text


@pytest.fixture(scope="module")
def expected():
    return [_expected(*row) for row in zip(PROMPTS, SEEDS, ROWS, strict=True)]


def _decoder(target: str, drafter: str, folder: Path) -> Decoder:
    if target in ("eager", "inductor"):
        return optimized(drafter, target)
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # to be quick
        getattr(optimized(drafter), f"export_{target}")(folder, row_options=[*OPTIONS], check=False)
    return emssd_compile.load(folder)


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        *(("eager", drafter) for drafter in ("none", "lookup", "draft-model", "forks")),
        ("onnx", "lookup"),
        *(pytest.param(target, "lookup", marks=pytest.mark.long) for target in ("inductor", "aot")),
    ],
)
def test_tokens_are_those_that_transformers_processors_lead_to(target, drafter, expected, tmp_path):
    """Eleven requests on three rows, a filter or several each, one without any."""
    decoder = _decoder(target, drafter, tmp_path)
    assert decoder.generate(PROMPTS, max_new_tokens=NEW, seed=SEEDS, **OPTIONS) == expected


FILTERS = [
    (number, name)
    for number, row in enumerate(ROWS[:-1])
    for name in row.keys() - {"do_sample", "renormalize_logits"}
    if row[name] != 0
]


def test_each_filter_matters(expected):
    """Without it the row would have become another text."""
    rows = [ROWS[number] | {name: 0 if name == "top_k" else None} for number, name in FILTERS]
    options: dict[str, Any] = {name: [row.get(name) for row in rows] for name in OPTIONS}
    prompts, seeds = [PROMPTS[number] for number, _ in FILTERS], [SEEDS[number] for number, _ in FILTERS]
    found = optimized("none").generate(prompts, max_new_tokens=NEW, seed=seeds, **options)
    same = [where for where, row in zip(FILTERS, found, strict=True) if row == expected[where[0]]]
    assert not same
