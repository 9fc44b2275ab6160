"""Every bad input is refused by name, and before any work."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import emssd_compile
from emssd_compile.drafters import Drafter, DraftModel, NoDrafter, PromptLookup
from emssd_compile.errors import CapacityError, DrafterError, InvalidInputError, OptionError, UnsupportedModelError
from tests.exactness.compiled import CAPACITY, target
from tests.exactness.models import build, prompt
from tests.zoo import VOCABULARY, toy_model


def _with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    return model


def _t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


class _Hidden(nn.Module):
    """Returns no logits but a string."""

    def forward(self, ids: torch.Tensor) -> str:
        return "hidden"


NEVER_CAPTURED: dict[str, tuple[Any, type[Exception], str]] = {
    "training mode": (lambda: build("llama").train(), InvalidInputError, r"training mode.*model\.eval\(\)"),
    "NaN weights": (lambda: _with_nan(build("llama")), InvalidInputError, r"embed_tokens\.weight holds NaN"),
    "meta weights": (lambda: build("own-positions").to("meta"), InvalidInputError, "meta device"),
    "encoder-decoder": (_t5, UnsupportedModelError, "T5ForConditionalGeneration is an encoder-decoder model"),
    "no module": (lambda: "gpt2", InvalidInputError, r"model is a str; pass a torch\.nn\.Module"),
}


@pytest.mark.parametrize("name", NEVER_CAPTURED)
def test_a_model_that_cannot_be_meant_is_refused_before_it_is_captured(name, monkeypatch):
    make, error, message = NEVER_CAPTURED[name]
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        emssd_compile.optimize(make(), max_length=CAPACITY, backend="eager")


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "bidirectional": (lambda: toy_model("bert", is_decoder=False), "attention"),
    "recurrent": (lambda: toy_model("mamba"), "MambaForCausalLM .*must work for any length"),
    "no logits": (lambda: _Hidden().eval(), "returned str, which holds no logits"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_of_another_kind_is_refused_with_its_reason(name):
    make, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        emssd_compile.optimize(make(), max_length=CAPACITY, backend="eager")


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "drafter": ({"drafter": "medusa?"}, OptionError, "unknown drafter 'medusa\\?'; choose one of"),
    "backend": ({"backend": "tvm"}, OptionError, "unknown backend 'tvm'; choose one of"),
    "layout": ({"layout": "sparse"}, OptionError, "unknown layout 'sparse'; choose one of"),
    "acceptance": ({"acceptance": "typical?"}, OptionError, "unknown acceptance rule 'typical\\?'; choose one of"),
    "max_batch": ({"max_batch": 0}, OptionError, "max_batch=0 must be an integer of at least 1"),
    "max_batch type": ({"max_batch": 2.0}, OptionError, "max_batch=2.0 must be an integer"),
    "max_length": ({"max_length": 1}, OptionError, "max_length=1 leaves no room"),
    "max_length beyond": ({"max_length": 4096}, OptionError, "max_length=4096 is more than the 2048 positions"),
    "prefill_chunk": ({"prefill_chunk": -1}, OptionError, "prefill_chunk=-1 must be an integer of at least 1"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_of_optimize_is_refused_before_the_model_is_captured(name, monkeypatch):
    options, error, message = BAD_OPTIONS[name]
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        emssd_compile.optimize(build("llama"), **options)


def test_without_a_limit_in_the_config_max_length_must_be_given():
    with pytest.raises(OptionError, match="max_length is needed"):
        emssd_compile.optimize(build("own-positions"), backend="eager")


@pytest.mark.parametrize("sizes", [{"num_draft_tokens": 0}, {"max_ngram": 0}, {"num_draft_tokens": 1.5}])
def test_a_bad_size_of_a_drafter_is_refused_where_it_is_made(sizes):
    with pytest.raises(OptionError, match=f"{next(iter(sizes))}=.* must be an integer of at least 1"):
        PromptLookup(**sizes)
    with pytest.raises(OptionError, match="must be an integer of at least 1"):
        DraftModel(build("own-positions"), num_draft_tokens=0)


def test_a_draft_model_of_another_vocabulary_is_refused():
    other = toy_model("llama", vocab_size=VOCABULARY + 8)
    message = f"predicts {VOCABULARY + 8} tokens and the target {VOCABULARY}, which differ by more than padding"
    with pytest.raises(DrafterError, match=message):
        emssd_compile.optimize(build("own-positions"), other, max_length=CAPACITY, backend="eager")


class _HostRead(Drafter):
    num_draft_tokens = 2

    def forward(self, context):
        if context.known[0] > 3:
            raise AssertionError
        return None


def test_a_drafter_that_cannot_be_traced_is_refused_by_name():
    compiled = target("llama")
    with pytest.raises(DrafterError, match=r"(?s)_HostRead failed while it was traced.*tensor operations only"):
        compiled.optimize(_HostRead())


@pytest.fixture(scope="module")
def fast():
    return target("llama").optimize(NoDrafter())


ONE = [prompt(5)]
BAD_PROMPTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "nothing": ((None,), {}, InvalidInputError, "no prompts"),
    "empty batch": (([],), {}, InvalidInputError, "inputs is an empty batch"),
    "empty tensor": ((torch.zeros(0, 4, dtype=torch.int64),), {}, InvalidInputError, "empty batch"),
    "empty prompt": (([[5, 6], []],), {}, InvalidInputError, "row 1 is an empty prompt"),
    "id too large": (([[5, VOCABULARY]],), {}, InvalidInputError, f"row 0, index 1: token id {VOCABULARY} is outside"),
    "negative id": (([[5], [6, -1]],), {}, InvalidInputError, "row 1, index 1: token id -1 is outside"),
    "too long": (([[5] * CAPACITY],), {}, CapacityError, f"row 0: a prompt of {CAPACITY} tokens leaves no room"),
    "too many new": ((ONE,), {"max_new_tokens": CAPACITY}, CapacityError, f"max_new_tokens={CAPACITY - 5} or less"),
    "float ids": ((torch.ones(1, 4),), {}, InvalidInputError, r"row 0 of inputs has dtype torch\.float32"),
    "mask with a hole": (
        (torch.ones(1, 4, dtype=torch.int64),),
        {"attention_mask": torch.tensor([[1, 0, 1, 1]])},
        InvalidInputError,
        "row 0 is not padded on one side only",
    ),
    "all padding": (
        (torch.ones(1, 4, dtype=torch.int64),),
        {"attention_mask": torch.zeros(1, 4, dtype=torch.int64)},
        InvalidInputError,
        "row 0 is an empty prompt",
    ),
    "unknown option": ((ONE,), {"max_new_token": 3}, OptionError, "no option 'max_new_token'; did you mean max_new_t"),
    "sampling": ((ONE,), {"do_sample": True}, NotImplementedError, "do_sample=True is not supported"),
    "scores": ((ONE,), {"output_scores": True}, NotImplementedError, "output_scores=True is not supported"),
    "eos": ((ONE,), {"eos_token_id": VOCABULARY}, OptionError, "outside the vocabulary"),
    "no new tokens": ((ONE,), {"max_new_tokens": 0}, OptionError, "max_new_tokens=0 is out of range"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_call_of_generate_is_refused_before_any_step(name, fast, monkeypatch):
    args, options, error, message = BAD_PROMPTS[name]
    monkeypatch.setattr(fast._engine.launcher, "step", lambda *inputs: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        fast.generate(*args, **{"max_new_tokens": 4, **options})
