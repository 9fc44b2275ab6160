"""Every backend and every export target decodes the model's own tokens, with every kind of drafter."""

from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.decoder import Decoder
from tests.exactness.models import Reference
from tests.export.subjects import DRAFTERS, Small, artifact, export, optimized, prompt

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


CASES = [
    *(("eager", drafter) for drafter in DRAFTERS),
    # Trees, and the target's logits; other trees: `test_draft_rows.py`, chains: `test_compile.py`.
    pytest.param("inductor", "target-initialized", marks=pytest.mark.long),
    *(("onnx", drafter) for drafter in DRAFTERS[:-1]),
    # Trees of heads: `test_heads.py`; forks are exported with options below, each time.
    *(pytest.param("onnx", drafter, marks=pytest.mark.long) for drafter in ("target-initialized", "forks")),
    ("aot", "lookup"),
    *(pytest.param("aot", drafter, marks=pytest.mark.long) for drafter in ("target-initialized", "forks")),
]


@pytest.mark.parametrize(("target", "drafter"), CASES)
def test_tokens_are_the_models_own(target, drafter, reference):
    decoder = _decoder(target, drafter)
    decoder.stats.reset()
    rows = decoder.generate(PROMPTS, max_new_tokens=NEW)
    assert rows == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    counted = optimized(drafter)
    counted.stats.reset()
    counted.generate(PROMPTS, max_new_tokens=NEW)
    assert decoder.stats == counted.stats, "the same drafts are made, and the same of them accepted"


OPTIONS: dict[str, Any] = {
    "repetition_penalty": [1.5, 1.0, 0.7, 1.2, 1.0],
    "frequency_penalty": 0.5,
    "sequence_bias": {(4,): 1.5, (9, 11): -3.0},
}


PROBED: dict[str, Any] = {"output_scores": True, "logprobs": True, "top_logprobs": 3}


def _check_told(found: Any, expected: Any) -> None:
    assert list(found) == list(expected) == ["sequences", "scores", "logprobs", "top_logprobs", "top_logprob_ids"]
    assert found.sequences == expected.sequences
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    for name in ("logprobs", "top_logprobs"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    for row, ids in enumerate(found.top_logprob_ids):
        assert torch.equal(ids, expected.top_logprob_ids[row])
        assert len(ids) == NEW


@pytest.mark.parametrize("target", ["onnx", pytest.param("aot", marks=pytest.mark.long)])
def test_an_artifact_honours_the_options_that_it_was_exported_with(target):
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    loaded, fast = emssd_compile.load(export(target, "forks", row_options=[*OPTIONS, *PROBED])), optimized("forks")
    expected = fast.generate(PROMPTS, max_new_tokens=NEW, **OPTIONS)
    told = {**OPTIONS, **PROBED, "return_dict_in_generate": True}
    _check_told(*(decoder.generate(PROMPTS, max_new_tokens=NEW, **told) for decoder in (loaded, fast)))
    assert expected != fast.generate(PROMPTS, max_new_tokens=NEW)
    for _ in range(2):
        loaded.stats.reset()
        assert loaded.generate(PROMPTS, max_new_tokens=NEW, **OPTIONS) == expected
        assert loaded.stats.num_accepted_draft_tokens > 0
        assert loaded.generate(PROMPTS, max_new_tokens=NEW) == fast.generate(PROMPTS, max_new_tokens=NEW)
    with pytest.raises(NotImplementedError, match=r"suppress_tokens=.*; export it with row_options="):
        loaded.generate(PROMPTS, max_new_tokens=NEW, suppress_tokens=[3])
