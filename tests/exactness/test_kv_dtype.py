"""Keys and values in 8 bits: the tokens of the model with such a cache, whatever is drafted and wherever it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import emssd_compile
from emssd_compile.drafters import DraftModel, EarlyExit
from emssd_compile.errors import OptionError
from emssd_compile.optimized_model import OptimizedModel
from tests.exactness.models import prompt
from tests.zoo import toy_model

ROWS, CAPACITY, NEW = 3, 96, 16
PROMPTS = [prompt(n) for n in (1, 5, 23, 40, 64, 2)]
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "seed": 5}


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """transformers' own cache, which keeps of each vector what 255 steps of its largest component can say."""

    def update(self, keys: Tensor, values: Tensor, *where: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return super().update(_rounded(keys), _rounded(values), *where, **options)


def _rounded(vectors: Tensor) -> Tensor:
    step = vectors.abs().max(-1, keepdim=True).values / 127
    return (vectors / step).round() * step


def _expected(model: PreTrainedModel) -> list[list[int]]:
    """Each prompt alone, token by token, by transformers."""
    return [_alone(model, ids, RoundedCache(config=model.config)) for ids in PROMPTS]


def _alone(model: PreTrainedModel, ids: list[int], cache: DynamicCache) -> list[int]:
    given = torch.tensor([ids])
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(given, attention_mask=torch.ones_like(given), past_key_values=cache, **options)
    return found[0].tolist()


def _optimized(model: PreTrainedModel, drafter: Any = "prompt-lookup", **options: Any) -> OptimizedModel:
    given = {"max_batch": ROWS, "max_length": CAPACITY, "backend": "eager", "kv_dtype": "int8", **options}
    return emssd_compile.optimize(model, drafter, **given)


def _tokens(fast: OptimizedModel, **options: Any) -> list[list[int]]:
    return fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=None, **options)


MEMORY: dict[str, dict[str, Any]] = {
    "slabs": {"memory": "slab"},
    "pool": {"memory": "paged", "kv_tokens": 160},
    "prefix cache": {"prefix_cache": True},
    "rings": {"prefill_chunk": 24},
}


@pytest.mark.parametrize("memory", MEMORY)
def test_the_tokens_are_those_of_the_model_with_rounded_keys_and_values(memory):
    model = toy_model("mistral", sliding_window=16) if memory == "rings" else toy_model("llama")
    expected = _expected(model)
    assert expected != [_alone(model, ids, DynamicCache(config=model.config)) for ids in PROMPTS]
    fast = _optimized(model, **MEMORY[memory])
    assert _tokens(fast) == expected
    assert _tokens(fast) == expected
    assert ("rings of" in fast.explain().memory) == (memory == "rings")


@pytest.mark.parametrize("drafter", ["draft-model-tree", "early-exit"])
def test_drafts_of_other_kinds_change_no_token(drafter):
    """Trees move packed vectors; layers of the target's own read them."""
    model = toy_model("llama")
    draft = {"draft-model-tree": DraftModel(toy_model("llama"), tree=(2, 2)), "early-exit": EarlyExit(1, 3)}[drafter]
    fast, plain = _optimized(model, draft), _optimized(model, "none")
    assert _tokens(fast) == _expected(model)
    assert fast.stats.num_accepted_draft_tokens > 0
    assert _tokens(fast, **SAMPLING) == _tokens(plain, **SAMPLING)
    own = {name: held for name, held in fast._engine.tensors.items() if "cache" in name}
    assert {held.dtype for name, held in own.items() if not name.startswith("drafter")} == {torch.int8}
    assert {held.dtype for name, held in own.items() if name.startswith("drafter")} <= {torch.float32}


def test_compiled_it_gives_the_same():
    model = toy_model("llama")
    assert _tokens(_optimized(model, backend="inductor")) == _expected(model)


def test_it_says_that_it_is_lossy_and_takes_less_memory():
    model = toy_model("llama")
    fast, plain = _optimized(model), _optimized(model, kv_dtype=None)
    assert (fast.stats.guarantee, plain.stats.guarantee) == ("lossy", "tokens")
    assert not fast.stats.lossless
    assert fast.explain().memory.endswith("in 8 bits, which is lossy")
    assert "lossy" not in plain.explain().memory
    size = plain._engine.tensors["k_cache_0"].shape[-1]
    assert fast._engine.tensors["k_cache_0"].nbytes * 4 * size == plain._engine.tensors["k_cache_0"].nbytes * (size + 4)
    fast.refresh()
    assert fast.stats.guarantee == "lossy"
    assert fast._engine.tensors["k_cache_0"].dtype == torch.int8


def test_what_cannot_be_is_refused_before_any_work(tmp_path):
    with pytest.raises(OptionError, match=r"unknown kv_dtype 'fp8'; choose one of \['int8'\], or leave it out"):
        _optimized(toy_model("llama"), kv_dtype="fp8")
    with pytest.raises(OptionError, match="compiled with kv_dtype='int8'; compile it without, to export it"):
        _optimized(toy_model("llama")).export_onnx(tmp_path / "step.onnx")
