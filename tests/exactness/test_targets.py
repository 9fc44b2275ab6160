"""Every backend and every export target decodes the model's own tokens, with every kind of drafter."""

import pytest

import emssd_compile
from emssd_compile.decoder import Decoder
from tests.exactness.models import Reference
from tests.export.subjects import DRAFTERS, Small, artifact, optimized, prompt

NEW = 24
PROMPTS = [prompt(n) for n in (1, 2, 7, 30, 61)]  # more than there are rows, and longer than a chunk


@pytest.fixture(scope="module")
def reference():
    return Reference(Small())


def _decoder(target: str, drafter: str) -> Decoder:
    if target in ("eager", "inductor"):
        return optimized(drafter, target)
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    return emssd_compile.load(artifact(target, drafter))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("target", ["eager", "inductor", "onnx", "aot"])
def test_tokens_are_the_models_own(target, drafter, reference):
    decoder = _decoder(target, drafter)
    decoder.stats.reset()
    rows = decoder.generate(PROMPTS, max_new_tokens=NEW)
    assert rows == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    counted = optimized(drafter)
    counted.stats.reset()
    counted.generate(PROMPTS, max_new_tokens=NEW)
    assert decoder.stats == counted.stats, "the same drafts are made, and the same of them accepted"
