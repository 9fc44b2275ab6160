"""`transformers.pipeline` takes an optimized model for a model of its own."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="its pipeline is what is tested")

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

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


def test_the_class_is_known_and_defaults_are_those_of_the_pipeline(pipelines, caplog):
    fast, plain = pipelines
    with caplog.at_level(logging.WARNING), _propagating("transformers"):
        again = pipeline("text-generation", model=fast.model, tokenizer=fast.tokenizer)
    assert "not supported" not in caplog.text
    own, expected = (each.generation_config.to_dict() for each in (again, plain))
    assert own == expected
    assert own["max_new_tokens"] > 20
    found = again(PROMPTS[0], do_sample=False, return_full_text=False)
    assert found == plain(PROMPTS[0], do_sample=False, return_full_text=False)


@contextlib.contextmanager
def _propagating(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def test_what_a_pipeline_saves_is_the_model(pipelines, tmp_path):
    fast, plain = pipelines
    fast.save_pretrained(tmp_path)
    saved = pipeline("text-generation", model=str(tmp_path), dtype=torch.float32)
    assert saved(PROMPTS[1], **OPTIONS) == plain(PROMPTS[1], **OPTIONS)


def test_text_streamers_of_several_prompts_at_once(pipelines):
    fast, plain = pipelines
    tokenizer = fast.tokenizer
    streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60) for _ in PROMPTS]
    with fast.model.session() as session:
        for text, streamer in zip(PROMPTS, streamers, strict=True):
            session.submit(tokenizer(text)["input_ids"], streamer=streamer, **OPTIONS)
        texts = ["".join(streamer) for streamer in streamers]
    assert texts == [plain(text, return_full_text=False, **OPTIONS)[0]["generated_text"] for text in PROMPTS]
