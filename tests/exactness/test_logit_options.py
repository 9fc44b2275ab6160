"""Each option that changes logits: token for token what transformers' own processors give in a plain loop."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from emssd_compile import OptimizedModel
from tests.exactness.compiled import CAPACITY, K, target
from tests.exactness.drafters import Oracle, OracleTree
from tests.exactness.models import prompt

ROWS, NEW = 3, 14
PROMPTS = [prompt(n) for n in (5, 40, 1, 17)]  # one more than there are rows
WAYS = (("llama", "prompt-lookup"), ("gpt2", "random-tree"))


def _penalise(presence: float, frequency: float, prompt_length: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The formula in the documentation of OpenAI's interface."""

    def change(ids: Tensor, scores: Tensor) -> Tensor:
        for token, count in Counter(ids[0, prompt_length:].tolist()).items():
            scores[0, token] -= count * frequency + presence
        return scores

    return change


def _bias(biases: dict[int, float]) -> Callable[[Tensor, Tensor], Tensor]:
    def change(ids: Tensor, scores: Tensor) -> Tensor:
        for token, bias in biases.items():
            scores[0, token] += bias
        return scores

    return change


def _theirs(model: Any, ids: list[int], eos: list[int], options: dict[str, Any]) -> LogitsProcessorList:
    """What `generate` of transformers makes of the options that it knows, and the others as they are defined."""
    own = {name: options.get(name) for name in ("logit_bias", "presence_penalty", "frequency_penalty")}
    known = {name: value for name, value in options.items() if name not in own}
    config = GenerationConfig(max_length=len(ids) + NEW, **known)
    config._eos_token_tensor = torch.tensor(eos)
    found = LogitsProcessorList()
    if own["logit_bias"]:
        found.append(_bias(own["logit_bias"]))
    penalties = own["presence_penalty"] or 0.0, own["frequency_penalty"] or 0.0
    if any(penalties):
        found.append(_penalise(*penalties, len(ids)))
    return LogitsProcessorList([*found, *model._get_logits_processor(config, input_ids_seq_length=len(ids))])


@torch.no_grad()
def _decoded(model: nn.Module, ids: list[int], eos: list[int], options: dict[str, Any]) -> list[int]:
    """One prompt, one token at a time, a full forward for each."""
    change, text = _theirs(model, ids, eos, options), torch.tensor([ids])
    for _ in range(NEW):
        scores = change(text, model(text).logits[:, -1].float())
        text = torch.cat([text, scores.argmax(-1, keepdim=True)], 1)
        if int(text[0, -1]) in eos:
            break
    return text[0].tolist()


@functools.cache
def _plain(architecture: str) -> list[list[int]]:
    return [_decoded(target(architecture, ROWS).model, ids, [], {}) for ids in PROMPTS]


@functools.cache
def _fast(architecture: str, drafter: str) -> OptimizedModel:
    return target(architecture, ROWS).optimize(target(architecture, ROWS).drafter(drafter), prefill_chunk=27)


def _cases(plain: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Values that matter to these texts: `new` is what is generated without them."""
    new = [row[len(ids) :] for row, ids in zip(plain, PROMPTS, strict=True)]
    often = [token for token, _ in Counter(token for row in new for token in row).most_common(8)]
    pairs = [list(row[i : i + 2]) for row in new for i in (0, 3, 7)]
    return {
        "repetition_penalty": {"repetition_penalty": 1.7},
        "repetition_penalty below 1": {"repetition_penalty": 0.6},
        "presence_penalty": {"presence_penalty": 1.5},
        "frequency_penalty": {"frequency_penalty": 0.9, "presence_penalty": -0.4},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "no_repeat_ngram_size of a text that would repeat": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.6},
        "sequence_bias": {"sequence_bias": {(often[0],): -2.0, **{tuple(pair): -4.5 for pair in pairs}}},
        "bad_words_ids": {"bad_words_ids": [[often[0]], *pairs]},
        "logit_bias": {"logit_bias": {often[0]: -3.0, often[1]: 1.25, often[2]: -100.0}},
        "suppress_tokens": {"suppress_tokens": often[:3]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [row[0] for row in new]},
        "begin_suppress_tokens behind a forced one": {
            "begin_suppress_tokens": [row[0] for row in new],
            "forced_bos_token_id": often[4],
        },
        "forced_bos_token_id": {"forced_bos_token_id": often[4]},
        "forced_eos_token_id": {"forced_eos_token_id": [often[5], often[6]]},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.35)},
        "remove_invalid_values": {"remove_invalid_values": True, "bad_words_ids": [[t] for t in range(2, 60)]},
        "all": {
            "sequence_bias": [[[often[0]], -1.0], [pairs[0], 2.5]],
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": pairs,
            "forced_bos_token_id": often[4],
            "forced_eos_token_id": often[5],
            "remove_invalid_values": True,
            "exponential_decay_length_penalty": (6, 1.1),
            "suppress_tokens": often[2:4],
            "begin_suppress_tokens": often[:2],
        },
    }


CASES = tuple(_cases([list(range(80))] * len(PROMPTS)))


@pytest.mark.parametrize(("architecture", "drafter"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers_processors(architecture, drafter, case):
    model, plain = target(architecture, ROWS).model, _plain(architecture)
    options = _cases(plain)[case]
    eos = [plain[0][len(PROMPTS[0]) + 9]] if "decay" in case or case == "all" else []
    expected = [_decoded(model, ids, eos, options) for ids in PROMPTS]
    assert case == "remove_invalid_values" or expected != plain, "the option matters here"
    fast = _fast(architecture, drafter)
    fast.stats.reset()
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=eos, **options) == expected
    assert fast.stats.num_draft_tokens > 0 or drafter == "prompt-lookup"
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[]) == plain, "and it leaves nothing behind"


@pytest.mark.parametrize(("architecture", "is_tree"), [("llama", True), ("gpt2", False)])
def test_drafts_that_follow_the_options_are_accepted_and_each_prompt_has_numbers_of_its_own(architecture, is_tree):
    of_rows: dict[str, Any] = {
        "repetition_penalty": [1.7, 1.0, 0.6, 0.7],
        "no_repeat_ngram_size": [0, 3, 2, 1],
        "presence_penalty": [0.0, 1.5, 0.0, -0.5],
        "forced_bos_token_id": [None, None, 9, 9],
    }
    for_all: dict[str, Any] = {"suppress_tokens": _cases(_plain(architecture))["suppress_tokens"]["suppress_tokens"]}
    expected = [
        _decoded(target(architecture, ROWS).model, ids, [], {**{n: v[row] for n, v in of_rows.items()}, **for_all})
        for row, ids in enumerate(PROMPTS)
    ]
    oracle = Oracle(expected, CAPACITY, K, wrong_of_seven=2, ragged=True)
    fast = target(architecture, ROWS).optimize(OracleTree(oracle, 8) if is_tree else oracle)
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], **of_rows, **for_all) == expected
    assert NEW < fast.stats.num_accepted_draft_tokens < fast.stats.num_draft_tokens
