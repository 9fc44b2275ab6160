"""`transformers.pipeline` takes an optimized model for a model of its own."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="its pipeline is what is tested")

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import emssd_compile

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
PROMPTS = [prompt["text"] for prompt in json.loads((DEMO_MODEL / "prompts.json").read_text())[:5]]
OPTIONS = {"do_sample": False, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def pipelines():
    """The text-generation pipelines of the compiled model and of the model itself."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL / "target", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL / "target", dtype=torch.float32)
    fast = emssd_compile.optimize(model, max_batch=4, backend="eager")
    return tuple(pipeline("text-generation", model=m, tokenizer=tokenizer) for m in (fast, model))


def test_one_prompt(pipelines):
    fast, plain = pipelines
    result = fast(PROMPTS[0], **OPTIONS)
    assert result == plain(PROMPTS[0], **OPTIONS)
    assert result[0]["generated_text"].startswith(PROMPTS[0])


@pytest.mark.parametrize("batch_size", [1, 3, 5], ids=["one by one", "ragged batches", "more prompts than rows"])
def test_a_list_of_prompts_in_padded_batches(pipelines, batch_size):
    fast, plain = pipelines
    result = fast(PROMPTS, batch_size=batch_size, return_full_text=False, **OPTIONS)
    assert result == plain(PROMPTS, return_full_text=False, **OPTIONS)  # one by one
    assert len(result) == len(PROMPTS)


def test_end_token_of_the_call_ends_the_text(pipelines):
    fast, plain = pipelines
    text = plain(PROMPTS[0], return_full_text=False, **OPTIONS)[0]["generated_text"]
    end = plain.tokenizer(text)["input_ids"][3]
    options = {**OPTIONS, "eos_token_id": end, "return_full_text": False}
    result = fast(PROMPTS[0], **options)
    assert result == plain(PROMPTS[0], **options)
    assert len(result[0]["generated_text"]) < len(text)


def test_what_is_not_supported_is_refused_through_the_pipeline_too(pipelines):
    with pytest.raises(NotImplementedError, match="num_beams"):
        pipelines[0](PROMPTS[0], num_beams=2, max_new_tokens=4)


def test_a_pipeline_can_be_printed(pipelines):
    assert "OptimizedModel" in repr(pipelines[0])
