"""Sinks and chunks, on every backend and target: the tokens are those of the model's own decoding."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import emssd_compile
from emssd_compile import ops
from emssd_compile.decoder import Decoder
from emssd_compile.drafters import PromptLookup
from emssd_compile.optimized_model import OptimizedModel
from tests.exactness.models import Reference
from tests.export.subjects import HEADS, WIDTH, Small, prompt

CHUNK, NEW = 8, 24
PROMPTS = [prompt(n) for n in (1, 2, 7, 8, 30, 61)]  # more than there are rows, and around a chunk's ends


class Sunk(Small):
    """Two key/value heads, a sink for each query head, and chunks within which tokens see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 6.0]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = ops.attention(
            q, k[:, :2], v[:, :2], scale=(WIDTH // HEADS) ** -0.5, window=6, chunk=CHUNK, sinks=self.sinks
        )
        return self.head(x + self.out(attended.transpose(1, 2).flatten(2)))


@functools.cache
def optimized(backend: str = "eager") -> OptimizedModel:
    return emssd_compile.optimize(
        Sunk(), PromptLookup(4), max_batch=3, max_length=128, backend=backend, layout="packed", prefill_chunk=24
    )


def decoder(target: str, folder: Path) -> Decoder:
    if target in ("eager", "inductor"):
        return optimized(target)
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # to be quick
        getattr(optimized(), f"export_{target}")(folder)
    return emssd_compile.load(folder)


@pytest.mark.parametrize(
    "target", ["eager", "onnx", *(pytest.param(name, marks=pytest.mark.long) for name in ("inductor", "aot"))]
)
def test_tokens_are_the_models_own(target, tmp_path):
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    reference = Reference(Sunk())
    rows = decoder(target, tmp_path / "artifact").generate(PROMPTS, max_new_tokens=NEW)
    assert rows == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]


def test_the_attributes_make_a_difference():
    """Else the test above says nothing."""
    references = Reference(Sunk()), Reference(Small())
    assert [references[0](ids, NEW) for ids in PROMPTS] != [references[1](ids, NEW) for ids in PROMPTS]
