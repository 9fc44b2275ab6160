"""transformers' own `generate`, with the compiled model in its place."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="it is transformers' own generate that is tested")

import transformers

import emssd_compile
from emssd_compile import hf
from emssd_compile.errors import OptionError
from tests.exactness.models import build, prompt

NEW = 9
PROMPTS = [prompt(n) for n in (7, 3, 12)]
WIDEST = max(map(len, PROMPTS))
INPUTS = {
    "input_ids": torch.tensor([[0] * (WIDEST - len(ids)) + ids for ids in PROMPTS]),
    "attention_mask": torch.tensor([[0] * (WIDEST - len(ids)) + [1] * len(ids) for ids in PROMPTS]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"min_new_tokens": 4, "eos_token_id": [86, 157], "pad_token_id": 0},
    "processors": {"repetition_penalty": 1.4, "bad_words_ids": [[11]], "no_repeat_ngram_size": 2},
    "several": {"num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def fast():
    model = build("llama")
    return emssd_compile.optimize(model, "prompt-lookup", max_batch=3, max_length=64, backend="eager", layout="packed")


@pytest.fixture
def other(fast):
    """`custom_generate`; the test fails if the compiled model is not what decodes."""
    fast.stats.reset()
    yield hf.generate(fast)
    assert fast.stats.num_emitted_tokens > 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_are_those_of_transformers(fast, other, options):
    how = {"max_new_tokens": NEW, "pad_token_id": 0, "num_beams": 1, "do_sample": False, **options}
    if "num_return_sequences" in how:
        found = fast.model.generate(**INPUTS, **{**how, "do_sample": True}, seed=5, custom_generate=other)
        assert found.shape == (len(PROMPTS) * 2, WIDEST + NEW)
        expected = fast.generate(**INPUTS, **{**how, "do_sample": True, "top_k": 50}, seed=5)
        assert torch.equal(found, expected)
        return
    found = fast.model.generate(**INPUTS, **how, custom_generate=other)
    assert torch.equal(found, fast.model.generate(**INPUTS, **how))


class _Ban(transformers.LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([86, 157]), -torch.inf)


class _Enough(transformers.StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= WIDEST + 4)


def test_processors_and_criteria_of_the_user_are_called(fast, other):
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    how |= {"logits_processor": [_Ban()], "stopping_criteria": [_Enough()]}
    found = fast.model.generate(**INPUTS, **how, custom_generate=other)
    assert found.shape == (3, WIDEST + 4)
    assert torch.equal(found, fast.model.generate(**INPUTS, **how))


def test_a_time_that_is_an_option_is_none_of_the_users_criteria(fast, other):
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "max_time": 100.0}
    found = fast.model.generate(**INPUTS, **how, custom_generate=other)
    assert torch.equal(found, fast.model.generate(**INPUTS, **how))


def test_a_criterion_in_the_place_of_an_option_is_not_ignored(fast):
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(max_length=WIDEST + 3)])
    with pytest.raises(NotImplementedError, match="MaxLengthCriteria: pass max_length instead"):
        fast.model.generate(**INPUTS, max_new_tokens=NEW, stopping_criteria=criteria, custom_generate=hf.generate(fast))


class _Seen(transformers.generation.BaseStreamer):  # type: ignore[misc]
    def __init__(self):
        self.ids: list[int] = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ids.append(-1)


def test_what_transformers_keeps_from_functions_does_nothing_as_the_docs_say(fast, other):
    seen, ids = _Seen(), torch.tensor([PROMPTS[2]])
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    kept = {"streamer": seen, "assistant_model": build("llama"), "custom_generate": other}
    assert torch.equal(fast.model.generate(ids, **how, **kept), fast.model.generate(ids, **how))
    assert seen.ids == PROMPTS[2], "the prompt, which transformers itself puts there, and never an end"
    with pytest.raises(ValueError, match="tokenizer"):
        fast.model.generate(ids, **how, stop_strings=["x"], custom_generate=other)


def test_a_prompt_alone(fast, other):
    ids = torch.tensor([PROMPTS[2]])
    assert torch.equal(
        fast.model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=other),
        fast.model.generate(ids, max_new_tokens=NEW, do_sample=False),
    )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"num_beams": 2}, "num_beams"),
        (
            {"repetition_penalty": 1.2, "logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(1.3)]},
            "RepetitionPenaltyLogitsProcessor, which an option asks for",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(fast, how, said):
    with pytest.raises((OptionError, NotImplementedError), match=said):
        fast.model.generate(**INPUTS, max_new_tokens=NEW, **how, custom_generate=hf.generate(fast))


def test_another_model_and_a_full_cache_are_refused(fast):
    another: Any = build("llama")
    with pytest.raises(OptionError, match="is not the model that was compiled"):
        another.generate(**INPUTS, max_new_tokens=NEW, custom_generate=hf.generate(fast))
    read = fast(torch.tensor([PROMPTS[0]]), use_cache=True)
    name = "cache" if "cache" in read else "past_key_values"  # the latter before transformers 5.24
    longer = torch.tensor([[*PROMPTS[0], 5]])
    with pytest.raises(OptionError, match="holds tokens"):
        fast.model.generate(longer, **{name: read[name]}, max_new_tokens=2, custom_generate=hf.generate(fast))


def test_a_folder_has_any_model_compiled_and_decode(tmp_path):
    model: Any = build("llama")
    options = {"drafter": "suffix", "max_batch": 3, "max_length": 64, "backend": "eager", "layout": "packed"}
    hf.save_custom_generate(tmp_path, **options)
    where: dict[str, Any] = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    how: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False, "repetition_penalty": 1.2}
    for _ in range(2):
        found = model.generate(**INPUTS, **how, **where)
        assert torch.equal(found, model.generate(**INPUTS, **how))
    fast = hf.compiled(model, options)
    assert fast.stats.num_emitted_tokens == 2 * len(PROMPTS) * NEW
    with pytest.raises(NotImplementedError, match=r"assistant_model=\(a LlamaForCausalLM\)"):
        model.generate(**INPUTS, **how, **where, assistant_model=build("llama"))

    seen = _Seen()
    (row,) = model.generate(torch.tensor([PROMPTS[1]]), **how, **where, streamer=seen)
    assert seen.ids == [*row.tolist(), -1]
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    assert torch.equal(model.generate(**INPUTS, **how, **where), model.generate(**INPUTS, **how))


@pytest.mark.usefixtures("little_garbage")
def test_what_was_compiled_lasts_as_long_as_the_model():
    model: Any = build("llama")
    options = {"drafter": "none", "max_batch": 1, "max_length": 16, "backend": "eager"}
    first = hf.compiled(model, options)
    assert hf.compiled(model, options) is first
    longer = hf.compiled(model, {**options, "max_length": 20})
    assert len(longer.generate([[5, 6]], max_new_tokens=18)[0]) == 20
    assert first.generate([[5, 6]], max_new_tokens=4) == longer.generate([[5, 6]], max_new_tokens=4)
    assert vars(copy.deepcopy(model))["_emssd_compiled"].fast is None
    gone = weakref.ref(longer)
    del model, first, longer
    gc.collect()
    assert gone() is None


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OptionError, match="processors"):
        hf.save_custom_generate(tmp_path, processors=[3])
    with pytest.raises(OptionError, match="drafter="):
        hf.save_custom_generate(tmp_path, drafter=build("llama"))
    hf.save_custom_generate(tmp_path)
    with pytest.raises(OptionError, match="exists"):
        hf.save_custom_generate(tmp_path)
