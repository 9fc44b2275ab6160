"""Sampled tokens are those of decoding without drafts with the same noise, whoever drafts and whatever the batch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

import emssd_compile
from emssd_compile.drafters import Drafter
from emssd_compile.errors import OptionError
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.requests import Request
from emssd_compile.step.randomness import gumbels
from tests.exactness.compiled import CAPACITY, K, rechunked, target
from tests.exactness.drafters import Oracle, OracleTree
from tests.exactness.models import prompt
from tests.export.subjects import Small

ROWS, NEW = 3, 16
LENGTHS = (1, 33, 5, 17, 48)
SEEDS = [11, -5, 2**63 - 1, 0, 123456789]
PROMPTS = [prompt(n) for n in LENGTHS]
DRAFTERS = (
    *("none", "prompt-lookup", "draft-model", "draft-model-tree", "target-initialized"),
    *("rubbish", "right", "right-tree"),
)
SELDOM = ("target-initialized", "rubbish")


class Sampled:
    """Sampling written to be obvious: one prompt, one token at a time, the largest of log p + noise."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, ids: list[int], seed: int, count: int = NEW) -> list[int]:
        """The text."""
        text = list(ids)
        for _ in range(count):
            output = self._model(torch.tensor([text]))
            logits = (output[0] if isinstance(output, tuple) else getattr(output, "logits", output))[0, -1]
            vocabulary = torch.arange(len(logits))
            noise = gumbels(torch.tensor(seed), torch.tensor(len(text)), vocabulary)
            text.append(int((logits.log_softmax(-1) + noise).argmax()))
        return text


@functools.cache
def _expected(architecture: str) -> list[list[int]]:
    sampled = Sampled(target(architecture, ROWS).model)
    return [sampled(ids, seed) for ids, seed in zip(PROMPTS, SEEDS, strict=True)]


def _drafter(architecture: str, name: str) -> Drafter:
    if not name.startswith("right"):
        return target(architecture, ROWS).drafter(name)
    oracle = Oracle(_expected(architecture), CAPACITY, K, wrong_of_seven=0, ragged=False)
    return oracle if name == "right" else OracleTree(oracle, 7)


@functools.cache
def _fast(architecture: str, name: str, layout: str = "packed") -> OptimizedModel:
    return target(architecture, ROWS).optimize(_drafter(architecture, name), layout=layout)


def _sample(fast: OptimizedModel, prompts: Any = PROMPTS, **options: Any) -> Any:
    chosen = {"do_sample": True, "seed": SEEDS, "eos_token_id": [], **options}
    return fast.generate(prompts, max_new_tokens=NEW, **chosen)


@pytest.mark.parametrize(
    ("architecture", "drafter"),
    [
        *(("gpt2", drafter) for drafter in DRAFTERS if drafter not in SELDOM),
        *(pytest.param("gpt2", drafter, marks=pytest.mark.long) for drafter in SELDOM),
        *(pytest.param(other, "draft-model-tree", marks=pytest.mark.long) for other in ("bloom", "gemma", "mistral")),
        ("own-positions", "draft-model"),
    ],
)
def test_tokens_are_those_of_sampling_without_drafts(architecture, drafter):
    assert _sample(_fast(architecture, drafter), top_k=0) == _expected(architecture)


@pytest.mark.parametrize(
    ("layout", "lag", "chunk", "drafter"),
    [("padded", 0, 1, "draft-model"), ("auto", 1, 24, "random-tree"), ("packed", 1, 1, "draft-model-tree")],
)
def test_whatever_the_layout_the_lag_and_the_chunks(layout, lag, chunk, drafter):
    fast = rechunked(_fast("gpt2", drafter, layout), chunk)
    fast._engine.lag = lag
    assert _sample(fast, top_k=0) == _expected("gpt2")


def test_drafts_that_are_what_is_drawn_are_all_accepted():
    fast = _fast("gpt2", "right")
    fast.stats.reset()
    _sample(fast, top_k=0)
    assert fast.stats.num_accepted_draft_tokens == fast.stats.num_draft_tokens > 0


def test_a_draft_model_that_is_the_target_draws_what_the_target_draws():
    fast = emssd_compile.optimize(Small(), Small(), max_batch=2, max_length=64, backend="eager", layout="packed")
    _sample(fast, [[1, 2], [3]], seed=4, top_k=0)
    assert fast.stats.num_accepted_draft_tokens == fast.stats.num_draft_tokens > 0


def test_rows_that_sample_and_rows_that_do_not_do_not_meet():
    fast, expected = _fast("gpt2", "draft-model"), _expected("gpt2")
    greedy = fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    for drawn in ([True, False, True, False, True], [False, True, False, True, False]):
        found = _sample(fast, do_sample=drawn, top_k=0)
        assert found == [e if d else g for d, e, g in zip(drawn, expected, greedy, strict=True)]
    order = [3, 1, 4, 0, 2]
    shuffled = _sample(fast, [PROMPTS[i] for i in order], seed=[SEEDS[i] for i in order], top_k=0)
    assert shuffled == [expected[i] for i in order]


def test_a_seed_repeats_a_call_and_gives_each_prompt_its_own():
    fast, same = _fast("gpt2", "draft-model"), [PROMPTS[2]] * 3
    first = _sample(fast, same, seed=3)
    assert _sample(fast, same, seed=3) == first
    assert _sample(fast, same[:1], seed=3) == first[:1]
    assert len(set(map(tuple, first))) == 3
    assert _sample(fast, same, seed=4) != first


def test_without_a_seed_torchs_generator_gives_one():
    fast = _fast("gpt2", "prompt-lookup")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(_sample(fast, seed=None))
    assert found[0] == found[1] != found[2]
    before = torch.get_rng_state()
    fast.generate(PROMPTS, max_new_tokens=2)
    assert torch.equal(before, torch.get_rng_state()), "greedy decoding draws nothing"


@pytest.mark.parametrize("seed", [1.5, True, 2**63, [1, 2], "3"])
def test_a_seed_that_makes_no_sense_is_refused(seed):
    with pytest.raises(OptionError, match="seed"):
        _sample(_fast("gpt2", "prompt-lookup"), seed=seed)


def test_a_rule_that_only_decodes_greedily_says_so():
    fast = emssd_compile.optimize(Small(), max_batch=2, max_length=64, backend="eager", acceptance="greedy")
    with pytest.raises(NotImplementedError, match="do_sample=True is not supported: the acceptance rule of this step"):
        fast.generate([[1]], max_new_tokens=3, do_sample=True)
    assert "top_k" not in fast.row_options
    with pytest.raises(OptionError, match="top_k=3 would have no effect: it only matters when sampling"):
        fast.generate([[1]], max_new_tokens=3, top_k=3)


def test_several_sequences_of_a_prompt_are_rows_with_seeds_of_their_own():
    fast = _fast("gpt2", "draft-model")
    found = _sample(fast, PROMPTS[:2], seed=[3, 4], num_return_sequences=3, top_k=0)
    assert [text[: len(ids)] for text, ids in zip(found[::3], PROMPTS, strict=False)] == PROMPTS[:2]
    assert found[::3] == _sample(fast, PROMPTS[:2], seed=[3, 4], top_k=0)
    assert all(len(set(map(tuple, texts))) == 3 for texts in (found[:3], found[3:]))
    padded = torch.tensor([[*PROMPTS[2], 0], [0, *PROMPTS[2]]])
    mask = torch.tensor([[1] * 5 + [0], [0] + [1] * 5])
    both = _sample(fast, padded, attention_mask=mask, seed=[3, 3], num_return_sequences=2, top_k=0)
    assert both.shape == (4, 6 + NEW)
    assert both[:2, 6:].equal(both[2:, 6:])


@pytest.mark.parametrize(("drafter", "lag"), [("none", 0), ("draft-model", 1), ("right-tree", 1)])
def test_a_prompt_is_read_once_for_all_its_sequences(drafter, lag):
    """More of them than rows, a prompt in chunks and one of one token; their tokens are those of each alone."""
    fast, prompts = rechunked(_fast("gpt2", drafter), 24), [PROMPTS[i] for i in (1, 0, 4)]
    fast._engine.lag = lag
    seeds, times = [SEEDS[i] for i in (1, 0, 4)], 4
    alone = [_sample(fast, prompts, seed=[seed + n for seed in seeds], top_k=0) for n in range(times)]
    fast.stats.reset()
    repeated = [ids for ids in prompts for _ in range(times)]
    requests = [
        Request(i, torch.tensor(ids), NEW, {"do_sample": True}, group=i // times, seed=seeds[i // times] + i % times)
        for i, ids in enumerate(repeated)
    ]
    for _ in fast._engine.run(requests):
        pass
    found = [request.prompt.tolist() + request.output for request in requests]
    assert found == [alone[i % times][i // times] for i in range(len(requests))]
    fed = fast._engine.counters()[0]["num_fed_tokens"]
    verified = sum(len(r.output) for r in requests)
    once = sum(len(ids) for ids in prompts)
    assert fed < once + len(requests) + verified * (8 if drafter == "right-tree" else K + 1)
    assert drafter != "none" or fed == once + times * len(prompts) - len(prompts) + verified - len(requests)


def test_several_sequences_that_would_be_the_same_are_refused():
    fast = _fast("gpt2", "draft-model")
    with pytest.raises(OptionError, match="num_return_sequences=2, but prompt 1 does not sample"):
        _sample(fast, PROMPTS[:2], seed=0, do_sample=[True, False], num_return_sequences=2)
    with pytest.raises(OptionError, match="num_return_sequences=0 is out of range"):
        _sample(fast, PROMPTS[:2], seed=0, num_return_sequences=0)


def test_each_prompt_may_have_a_config_of_its_own():
    fast, banned = _fast("gpt2", "draft-model"), [_expected("gpt2")[4][LENGTHS[4]]]
    configs = [
        GenerationConfig(do_sample=True, temperature=0.5, top_k=9, max_new_tokens=7),
        GenerationConfig(max_new_tokens=NEW),
        GenerationConfig(do_sample=True, top_p=0.8, max_new_tokens=3),
        GenerationConfig(repetition_penalty=1.4, max_length=LENGTHS[3] + 9),
        GenerationConfig(do_sample=True, top_k=0, suppress_tokens=banned, max_new_tokens=NEW),
    ]
    together = fast.generate(PROMPTS, configs, seed=SEEDS, eos_token_id=[])
    alone = [
        fast.generate([ids], config, seed=seed, eos_token_id=[])[0]
        for ids, config, seed in zip(PROMPTS, configs, SEEDS, strict=True)
    ]
    assert together == alone
    assert [len(text) - n for text, n in zip(together, LENGTHS, strict=True)] == [7, NEW, 3, 9, NEW]
    assert together[4] != _expected("gpt2")[4]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "empty list"),
        ([GenerationConfig(max_new_tokens=2)] * 2, "2 configs for 5 prompts"),
        ([GenerationConfig(max_time=n + 9.0, max_new_tokens=2) for n in range(5)], "number 1 has another max_time"),
        ([GenerationConfig(pad_token_id=n, max_new_tokens=2) for n in range(5)], "number 1 has another pad_token_id"),
    ],
)
def test_configs_that_do_not_fit_are_refused(configs, message):
    with pytest.raises(OptionError, match=message):
        _fast("gpt2", "draft-model").generate(PROMPTS, configs)
