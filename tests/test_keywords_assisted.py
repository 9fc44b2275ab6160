"""transformers' options of assisted decoding: what the drafter of the step does may be asked for, and nothing else."""

import re
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="its options are what is tested")

from transformers import GenerationConfig

import emssd_compile
from emssd_compile import hf
from emssd_compile.drafters import MTP, DraftModel, EarlyExit, PromptLookup
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.mtp_config import MTPConfig
from emssd_compile.errors import OptionError
from emssd_compile.generation import GenerateOptions, resolve_options
from emssd_compile.step.drafting import Drafter
from tests.drafters.llama_heads import HIDDEN
from tests.exactness.models import build, prompt
from tests.zoo import VOCABULARY

NEW: dict[str, Any] = {"max_new_tokens": 3}


def resolve(config: object = None, *, assisted: dict[str, object] | None = None, **kwargs: object) -> GenerateOptions:
    return resolve_options(config, kwargs, vocab_size=64, assisted=assisted or {})


ASSISTED: dict[str, Any] = {
    "assistant_model": nn.Linear(1, 1),
    "prompt_lookup_num_tokens": 7,
    "max_matching_ngram_size": 3,
    "num_assistant_tokens": 4,
    "use_mtp": True,
    "assistant_early_exit": 2,
}
OTHERWISE: dict[str, Any] = {
    "assistant_model": (nn.Linear(1, 1), "DraftModel(assistant_model)"),
    "prompt_lookup_num_tokens": (8, "PromptLookup(prompt_lookup_num_tokens)"),
    "max_matching_ngram_size": (2, "PromptLookup(max_ngram=max_matching_ngram_size)"),
    "num_assistant_tokens": (5, "DraftModel(assistant_model, num_assistant_tokens)"),
    "use_mtp": (1, "MTP.from_pretrained(folder)"),
    "assistant_early_exit": (2.0, "EarlyExit(assistant_early_exit)"),
}


@pytest.mark.parametrize("name", ASSISTED)
def test_a_drafter_that_is_there_may_be_asked_for_and_another_is_refused(name):
    value, (other, remedy) = ASSISTED[name], OTHERWISE[name]
    assert resolve(assisted=ASSISTED, **NEW, **{name: value}) == resolve(**NEW)
    for assisted, asked in ((ASSISTED, other), ({}, value)):
        with pytest.raises(NotImplementedError, match=rf"{name}=.*{re.escape(remedy)}"):
            resolve(assisted=assisted, **NEW, **{name: asked})
    assert resolve(**NEW, **{name: None}) == resolve(**NEW)


def test_a_config_may_say_how_to_draft_but_not_who_does():
    assert resolve(GenerationConfig(num_assistant_tokens=9, max_matching_ngram_size=9, **NEW)) == resolve(**NEW)
    asking = GenerationConfig(prompt_lookup_num_tokens=9, **NEW)
    with pytest.raises(NotImplementedError, match=r"generation_config \(generate\(prompt_lookup_num_tokens=None"):
        resolve(asking)
    assert resolve(asking, prompt_lookup_num_tokens=None) == resolve(**NEW)


def test_how_many_drafts_are_verified_is_no_option():
    off: dict[str, Any] = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    assert resolve(**NEW, **off) == resolve(**NEW)
    on: dict[str, Any] = {"num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.4}
    for name, value in on.items():
        with pytest.raises(OptionError, match=f"{name}=.*layout='auto'"):
            resolve(**NEW, **{name: value})


def test_what_drafters_answer_to():
    assert PromptLookup(5, 2).assisted() == {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 2}
    assert EarlyExit(2, 3).assisted() == {"assistant_early_exit": 2, "num_assistant_tokens": 3}
    assert EarlyExit([0, 2]).assisted() == {"num_assistant_tokens": 4}


@pytest.fixture(scope="module")
def fast():
    return emssd_compile.optimize(
        build("llama"), DraftModel(build("llama"), 3), max_batch=2, max_length=64, backend="eager", layout="packed"
    )


def test_the_assistant_that_was_compiled_drafts(fast):
    ids = [prompt(7), prompt(4)]
    how: dict[str, Any] = {"assistant_model": fast.drafter.model, "num_assistant_tokens": 3}
    fast.stats.reset()
    assert fast.generate(ids, **NEW, **how) == fast.generate(ids, **NEW)
    assert fast.stats.num_draft_tokens > 0
    with pytest.raises(NotImplementedError, match=r"assistant_model=\(a LlamaForCausalLM\)"):
        fast.generate(ids, **NEW, assistant_model=build("llama"))
    with fast.session() as session, pytest.raises(NotImplementedError, match="num_assistant_tokens=4"):
        session.submit(ids[0], **NEW, num_assistant_tokens=4)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"prompt_lookup_num_tokens": 5}, "prompt_lookup_num_tokens=5"),
        ({"num_assistant_tokens": 5}, "num_assistant_tokens=5"),
        ({"num_assistant_tokens_schedule": "heuristic"}, "num_assistant_tokens_schedule='heuristic'"),
        ({"assistant_confidence_threshold": 0.3}, "assistant_confidence_threshold=0.3"),
        ({"assistant_lookbehind": 3}, "assistant_lookbehind=3"),
        ({"use_mtp": True}, "use_mtp=True"),
    ],
)
def test_behind_transformers_generate_too(fast, how, said):
    ids = torch.tensor([prompt(7)])
    with pytest.raises((NotImplementedError, OptionError), match=said):
        fast.model.generate(ids, **NEW, **how, custom_generate=hf.generate(fast))
    same = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    found = fast.model.generate(ids, **NEW, **same, do_sample=False, custom_generate=hf.generate(fast))
    assert torch.equal(found, fast.model.generate(ids, **NEW, do_sample=False))


def _head() -> MTP:
    head = MTP(MTPConfig(HIDDEN, VOCABULARY, LayerSizes(HIDDEN, 48, 4, 2, 16)))
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


DRAFTERS: dict[str, tuple[Drafter, dict[str, Any]]] = {
    "prompt lookup": (PromptLookup(5, 2), {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 2}),
    "own modules": (_head(), {"use_mtp": True}),
    "first layers": (EarlyExit(1, 3), {"assistant_early_exit": 1, "num_assistant_tokens": 3}),
}


@pytest.mark.parametrize(("drafter", "how"), DRAFTERS.values(), ids=DRAFTERS)
def test_the_drafter_that_was_compiled_may_be_asked_for_behind_transformers_generate(drafter, how):
    fast = emssd_compile.optimize(build("llama"), drafter, max_length=64, backend="eager", layout="packed")
    model: Any = fast.model
    ids, plain = torch.tensor([prompt(30)]), {"max_new_tokens": 12, "do_sample": False}
    found = model.generate(ids, **plain, **how, custom_generate=hf.generate(fast))
    assert torch.equal(found, model.generate(ids, **plain))
    assert fast.stats.num_draft_tokens > 0
    with pytest.raises(NotImplementedError, match=next(iter(how))):
        model.generate(ids, **plain, **how, custom_generate=hf.generate(_without_drafts(model)))


def _without_drafts(model: nn.Module) -> Any:
    return emssd_compile.optimize(model, "none", max_length=64, backend="eager", layout="packed")
