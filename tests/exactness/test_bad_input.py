"""Every bad input is refused by name, and before any work."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import emssd_compile
from emssd_compile.acceptance import GreedyMatch, Rule
from emssd_compile.drafters import Drafter, DraftModel, MLPSpeculator, NoDrafter, PromptLookup
from emssd_compile.drafters.mlp_speculator import MLPSpeculatorConfig
from emssd_compile.errors import (
    CapacityError,
    DrafterError,
    InvalidInputError,
    OptionError,
    RuleError,
    UnsupportedModelError,
)
from emssd_compile.options import CompileOptions
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
    "NaN weights": (
        lambda: _with_nan(build("llama")),
        InvalidInputError,
        r"embed_tokens\.weight of the LlamaForCausalLM holds NaN",
    ),
    "meta weights": (lambda: build("own-positions").to("meta"), InvalidInputError, "meta device"),
    "encoder-decoder": (_t5, UnsupportedModelError, "T5ForConditionalGeneration is an encoder-decoder model"),
    "a class": (lambda: nn.Linear, InvalidInputError, "model is the class Linear; pass an instance of it"),
    "no module": (lambda: "gpt2", InvalidInputError, r"model is a str; pass a torch\.nn\.Module"),
}


@pytest.mark.parametrize("name", NEVER_CAPTURED)
def test_a_model_that_cannot_be_meant_is_refused_before_it_is_captured(name, monkeypatch):
    make, error, message = NEVER_CAPTURED[name]
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        emssd_compile.optimize(make(), max_length=CAPACITY, backend="eager")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with_nan, r"weight emb\.0\.weight of the MLPSpeculator holds NaN"),
        (lambda head: head.to("meta"), r"weight emb\.0\.weight of the MLPSpeculator is on the meta device"),
    ],
)
def test_a_head_with_weights_that_are_no_numbers_is_refused_before_anything_is_captured(spoil, message, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))
    head = spoil(MLPSpeculator(MLPSpeculatorConfig(64, VOCABULARY)))
    with pytest.raises(InvalidInputError, match=message):
        emssd_compile.optimize(build("llama"), head, max_length=CAPACITY, backend="eager")


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


class _NoForward(Drafter):
    num_draft_tokens = 2


class _RuleWithoutForward(Rule):
    guarantees = "tokens"


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "drafter": ({"drafter": "medusa?"}, OptionError, "unknown drafter 'medusa\\?'; choose one of"),
    "backend": ({"backend": "tvm"}, OptionError, "unknown backend 'tvm'; choose one of"),
    "layout": ({"layout": "sparse"}, OptionError, "unknown layout 'sparse'; choose one of"),
    "acceptance": ({"acceptance": "typical?"}, OptionError, "unknown acceptance rule 'typical\\?'; choose one of"),
    "max_batch": ({"max_batch": 0}, OptionError, "max_batch=0 is out of range; pass at least 1"),
    "max_batch type": ({"max_batch": 2.0}, OptionError, "max_batch=2.0 is not an integer"),
    "max_length": ({"max_length": 1}, OptionError, "max_length=1 leaves no room"),
    "max_length beyond": ({"max_length": 4096}, OptionError, "max_length=4096 is more than the 2048 positions"),
    **{
        f"{name} {kind}": ({name: value}, error, message)
        for name in ("max_batch", "max_length", "prefill_chunk")
        for kind, (value, error, message) in {
            "NaN": (math.nan, OptionError, f"{name}=nan is not an integer"),
            "infinite": (math.inf, OptionError, f"{name}=inf is not an integer"),
            "bool": (True, OptionError, f"{name}=True is a bool"),
            "numpy bool": (np.True_, OptionError, f"{name}=True is a bool"),
            "bool tensor": (torch.tensor(True), OptionError, f"{name}=True is a bool"),
            "huge": (10**30, OptionError, f"{name}={10**30} is out of range; pass at most"),
            "very huge": (10**5000, OptionError, f"{name}=.* is out of range; pass at most"),
            "negative": (-(10**30), OptionError, f"{name}={-(10**30)} is out of range; pass at least 1"),
        }.items()
    },
    "max_batch that no memory holds": (
        {"max_batch": 2**40},
        CapacityError,
        rf"max_batch={2**40} rows of max_length=2048 tokens need .* GiB .* smaller max_length or max_batch",
    ),
    "max_batch at the end of int64": ({"max_batch": 2**63 - 1}, CapacityError, "GiB"),
    "deterministic": ({"deterministic": "yes"}, OptionError, "deterministic='yes' is not True or False"),
    "small prefill_chunk": (
        {"max_batch": 8, "prefill_chunk": 16},
        OptionError,
        r"prefill_chunk=16 is less than the 64 tokens that a step of 8 rows with 7 drafts each takes; pass at least 64",
    ),
    "small prefill_chunk without drafts": (
        {"max_batch": 8, "drafter": "none", "prefill_chunk": 7},
        OptionError,
        "prefill_chunk=7 is less than the 8 tokens",
    ),
    "a class of drafters": (
        {"drafter": PromptLookup},
        OptionError,
        r"make an instance: drafter=PromptLookup\(",
    ),
    "a class of models as drafter": (
        {"drafter": nn.Linear},
        OptionError,
        "drafter=Linear is a class; make an inst",
    ),
    "a class of rules": ({"acceptance": GreedyMatch}, OptionError, "acceptance=GreedyMatch is a class; make an inst"),
    "a drafter without forward": ({"drafter": _NoForward()}, DrafterError, "_NoForward has no forward of its own; def"),
    "a rule without forward": (
        {"acceptance": _RuleWithoutForward()},
        RuleError,
        "_RuleWithoutForward has no forward of its own; define",
    ),
    "more drafts than a row holds": (
        {"drafter": PromptLookup(num_draft_tokens=10**6)},
        OptionError,
        r"num_draft_tokens=1000000: a row has at most 1024 drafts",
    ),
    "prefill_chunk": ({"prefill_chunk": -1}, OptionError, "prefill_chunk=-1 is out of range; pass at least 1"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_of_optimize_is_refused_before_the_model_is_captured(name, monkeypatch):
    options, error, message = BAD_OPTIONS[name]
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        emssd_compile.optimize(build("llama"), **options)


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_a_size_of_another_kind_of_integer_is_a_size(kind):
    yes: Any = np.True_
    options = CompileOptions(kind(2), kind(64), prefill_chunk=kind(32), deterministic=yes)
    assert options == CompileOptions(2, 64, prefill_chunk=32, deterministic=True)
    assert type(options.max_batch) is type(options.prefill_chunk) is int
    with pytest.raises(OptionError, match="max_length=4096 is more than the 2048 positions"):
        emssd_compile.optimize(build("llama"), max_length=kind(4096))


def test_prefill_chunk_is_what_was_asked_for_and_no_more_than_there_can_be():
    def chunk(asked: int | None, rows: int = 8) -> int:
        return CompileOptions(rows, 96, prefill_chunk=asked).chunk(num_draft_tokens=7)

    assert [chunk(64), chunk(65), chunk(500)] == [64, 65, 500]
    assert chunk(2**62) == 8 * 96
    assert [chunk(None), chunk(None, rows=100)] == [512, 800]


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
    with pytest.raises(DrafterError, match=r"_HostRead.forward reads a value to the host, as with \.item\(\)"):
        compiled.optimize(_HostRead())


@pytest.fixture(scope="module")
def fast():
    return target("llama").optimize(NoDrafter())


ONE = [prompt(5)]
BAD_PROMPTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "nothing": ((None,), {}, InvalidInputError, "no prompts"),
    "a bool among ids": (([[True, 6]],), {}, InvalidInputError, "row 0 of inputs mixes bools and numbers"),
    "a bool tensor among ids": (([[torch.tensor(True), 6]],), {}, InvalidInputError, "row 0 of inputs mixes bools"),
    "bools": (([[True, False]],), {}, InvalidInputError, r"dtype torch\.bool"),
    "NaN": (([[5, math.nan]],), {}, InvalidInputError, r"dtype torch\.float32"),
    "huge id": (([[5, 10**30]],), {}, InvalidInputError, "row 0 of inputs is not a list of token ids"),
    "meta ids": ((torch.ones(1, 4, dtype=torch.int64, device="meta"),), {}, InvalidInputError, "the meta device"),
    "meta row": (([torch.ones(4, dtype=torch.int64, device="meta")],), {}, InvalidInputError, "the meta device"),
    "meta mask": (
        (torch.ones(1, 4, dtype=torch.int64),),
        {"attention_mask": torch.ones(1, 4, device="meta")},
        InvalidInputError,
        "attention_mask is on the meta device",
    ),
    "sparse ids": ((torch.ones(1, 4).long().to_sparse(),), {}, InvalidInputError, "layout torch.sparse_coo"),
    "ragged array": ((np.array([[5], [5, 6]], dtype=object),), {}, InvalidInputError, "array of object"),
    "float array": ((np.ones((1, 4)),), {}, InvalidInputError, r"dtype torch\.float64"),
    "bool array": ((np.ones((1, 4), dtype=bool),), {}, InvalidInputError, r"dtype torch\.bool"),
    "array with id too large": ((np.array([[5, 2**40]]),), {}, InvalidInputError, f"token id {2**40} is outside"),
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
    "beams": ((ONE,), {"num_beams": 2}, NotImplementedError, "num_beams=2 is not supported"),
    "no sampling": (
        (ONE,),
        {"temperature": 0.5},
        OptionError,
        r"temperature=0\.5 would have no effect without do_sample",
    ),
    "scores": ((ONE,), {"output_scores": True}, OptionError, "output_scores: the sequences alone would be returned"),
    "hidden states": ((ONE,), {"output_hidden_states": True}, NotImplementedError, "output_hidden_states=True is not"),
    "eos": ((ONE,), {"eos_token_id": VOCABULARY}, OptionError, "outside the vocabulary"),
    "NaN seconds": ((ONE,), {"max_time": math.nan}, OptionError, "max_time=nan is out of range"),
    "huge minimum": ((ONE,), {"min_new_tokens": 10**30}, OptionError, f"min_new_tokens={10**30} is out of range"),
    "huge pad": ((ONE,), {"pad_token_id": 10**30}, OptionError, f"pad_token_id={10**30} is out of range"),
    "huge length": ((ONE,), {"max_new_tokens": None, "max_length": 2**62}, CapacityError, "do not fit a row"),
    "no new tokens": ((ONE,), {"max_new_tokens": 0}, OptionError, "max_new_tokens=0 is out of range"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_call_of_generate_is_refused_before_any_step(name, fast, monkeypatch):
    args, options, error, message = BAD_PROMPTS[name]
    monkeypatch.setattr(fast._engine.launcher, "launch", lambda *inputs: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        fast.generate(*args, **{"max_new_tokens": 4, **options})
