import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from bench.baselines import hf_assisted, hf_generate, realign, vanilla_padded
from bench.baselines.hf_static import StaticGenerate
from bench.baselines.padded_cache import PaddedCache
from bench.baselines.prompt_lookup import PromptLookup
from bench.baselines.realigned_cache import RealignedCache
from emssd_compile.errors import InvalidInputError, OptionError, UnsupportedModelError
from tests.zoo import POSITIONS, VOCABULARY, toy_model

MODEL_TYPES = ["llama", "gpt2", "opt"]
NUM_NEW = 24


def greedy(model: PreTrainedModel, prompt: list[int], num_new: int = NUM_NEW) -> list[int]:
    """The definition of the right answer: one prompt alone, no cache, no mask, no end of sequence."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_new):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def ragged_prompts(lengths: Iterable[int] = (1, 40, 7, 2, 19), seed: int = 0) -> list[list[int]]:
    """A repeated phrase in each prompt gives prompt lookup something to copy."""
    rng = random.Random(seed)
    phrase = [rng.randrange(VOCABULARY) for _ in range(5)]
    return [[rng.randrange(VOCABULARY) if i % 8 > 4 else phrase[i % 8] for i in range(length)] for length in lengths]


class ScriptedDrafter:
    """Step `i` drafts `plan[i][0]` tokens of which exactly the first `plan[i][1]` are right; then the whole truth."""

    def __init__(self, truth: list[int], plan: Iterable[tuple[int, int]]) -> None:
        self._truth = truth
        self._plan = iter(plan)
        self._num_emitted = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self._num_emitted += len(tokens)

    def draft(self, limit: int) -> list[int]:
        num_drafts, num_right = next(self._plan, (limit, limit))
        drafts = self._truth[self._num_emitted :][: min(num_drafts, limit)]
        return drafts[:num_right] + [token ^ 1 for token in drafts[num_right:]]


def scripted(truths: dict[tuple[int, ...], list[int]], plans: Sequence[Iterable[tuple[int, int]]]) -> Any:
    """A drafter factory for `speculate`; plans are handed out in the order of the rows."""
    remaining = iter(plans)
    return lambda prompt: ScriptedDrafter(truths[tuple(prompt)], next(remaining))


@pytest.fixture(scope="module", params=MODEL_TYPES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return toy_model(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return toy_model("llama")


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> list[list[int]]:
    return [greedy(model, prompt) for prompt in ragged_prompts()]


def test_hf_generate_on_a_padded_batch_is_greedy_decoding_of_each_prompt(model, expected):
    result = hf_generate.run(model, ragged_prompts(), max_new_tokens=NUM_NEW)
    assert result.tokens == expected
    assert result.stats["num_forward_passes"] == NUM_NEW
    assert result.stats["num_padding_tokens"] == sum(40 - len(prompt) for prompt in ragged_prompts())
    assert result.prefill_seconds is not None
    assert 0 < result.prefill_seconds < result.seconds


def test_hf_assisted_by_lookup_is_greedy_decoding_of_each_prompt(model, expected):
    result = hf_assisted.run(model, ragged_prompts(), max_new_tokens=NUM_NEW, prompt_lookup_num_tokens=4)
    assert result.tokens == expected
    assert 1 <= result.stats["mean_acceptance_length"] <= 5


def test_hf_assisted_by_a_model_is_greedy_decoding_and_saves_forward_passes(llama):
    prompts = ragged_prompts()
    expected = [greedy(llama, prompt) for prompt in prompts]
    stranger, twin = toy_model("llama", seed=1), toy_model("llama")
    guessing = hf_assisted.run(llama, prompts, max_new_tokens=NUM_NEW, assistant_model=stranger, num_assistant_tokens=3)
    knowing = hf_assisted.run(llama, prompts, max_new_tokens=NUM_NEW, assistant_model=twin, num_assistant_tokens=3)
    assert guessing.tokens == knowing.tokens == expected
    assert knowing.stats["num_forward_passes"] < guessing.stats["num_forward_passes"]


@pytest.mark.parametrize("drafter", [{"prompt_lookup_num_tokens": 4, "assistant_model": object()}, {}])
def test_hf_assisted_wants_exactly_one_drafter(llama, drafter):
    with pytest.raises(OptionError, match="either prompt_lookup_num_tokens or assistant_model"):
        hf_assisted.run(llama, [[1]], max_new_tokens=1, **drafter)


@pytest.mark.parametrize("run", [vanilla_padded.run, realign.run])
def test_batched_lookup_is_greedy_decoding_of_each_prompt(model, expected, run):
    result = run(model, ragged_prompts(), max_new_tokens=NUM_NEW)
    assert result.tokens == expected
    assert result.stats["num_draft_tokens"] > 0


def test_a_static_cache_gives_greedy_decoding_again_and_again_and_counts_padding():
    llama = toy_model("llama", num_hidden_layers=1)
    prompts = ragged_prompts()
    expected = [greedy(llama, prompt, 6) for prompt in prompts]
    static = StaticGenerate(llama)
    widest = max(map(len, prompts))
    for rows, num_new, room in [(slice(5), 6, 6), (slice(5), 1, 6), (slice(5), 6, 6), (slice(1, 3), 1, 1)]:
        result = static.run(prompts[rows], max_new_tokens=num_new)
        assert static.cache_length == widest + room  # kept for fewer tokens, new for another batch
        assert result.tokens == [tokens[:num_new] for tokens in expected[rows]]
        assert result.stats["num_padding_tokens"] == sum(widest - len(prompt) for prompt in prompts[rows])


@pytest.mark.parametrize("make_cache", [PaddedCache, RealignedCache])
@pytest.mark.parametrize("seed", range(3))
def test_batched_speculation_is_exact_whatever_the_drafts(model, expected, seed, make_cache):
    rng = random.Random(seed)
    prompts = ragged_prompts()
    truths = {tuple(prompt): truth for prompt, truth in zip(prompts, expected, strict=True)}
    plans = [[(n := rng.randint(0, 6), rng.randint(0, n)) for _ in range(NUM_NEW)] for _ in prompts]
    result = vanilla_padded.speculate(
        model, prompts, scripted(truths, plans), max_new_tokens=NUM_NEW, num_draft_tokens=6, make_cache=make_cache
    )
    assert result.tokens == expected


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_padding_stays_inside_a_learned_position_table(model_type):
    model = toy_model(model_type)
    num_new = 8
    prompts = ragged_prompts([POSITIONS - num_new, 5])  # the first row ends with the table
    expected = [greedy(model, prompt, num_new) for prompt in prompts]
    truths = {tuple(prompt): truth for prompt, truth in zip(prompts, expected, strict=True)}
    plans = [[(7, 7)], [(0, 0), (7, 0)]]  # row 0 is finished while row 1 makes the inputs wide
    result = vanilla_padded.speculate(
        model, prompts, scripted(truths, plans), max_new_tokens=num_new, num_draft_tokens=7
    )
    assert result.tokens == expected


def test_padding_of_the_worked_example_of_ems_sd(llama):
    prompts = ragged_prompts([6, 6])
    expected = [greedy(llama, prompt, 8) for prompt in prompts]
    truths = {tuple(prompt): truth for prompt, truth in zip(prompts, expected, strict=True)}
    # Drafts 5 and 2, emits 4 and 1; drafts 2 and 5, emits 2 and 6: 3 + 3 padding tokens and 3 + 4 padding slots.
    plans = [[(5, 3), (2, 1)], [(2, 0), (5, 5)]]
    stats = vanilla_padded.speculate(
        llama, prompts, scripted(truths, plans), max_new_tokens=8, num_draft_tokens=5
    ).stats
    # A third step emits the last token of the first row: the second one is finished and pads both by one.
    assert stats == {
        "num_forward_passes": 4,
        "num_spec_steps": 3,
        "num_draft_tokens": 14,
        "num_accepted_draft_tokens": 9,
        "mean_acceptance_length": 14 / 5,
        "num_padding_tokens": 3 + 3 + 1,
        "num_padding_kv_slots": 3 + 4 + 1,
    }


def test_realigned_rows_have_no_holes_only_room_before_them(llama):
    prompts = ragged_prompts([6, 9])
    truths = {tuple(prompt): greedy(llama, prompt, 8) for prompt in prompts}
    plans = [[(5, 3), (2, 1)], [(2, 0), (5, 5)]]
    options: dict[str, Any] = {"max_new_tokens": 8, "num_draft_tokens": 5}
    padded, realigned = (
        vanilla_padded.speculate(llama, prompts, scripted(truths, plans), make_cache=make_cache, **options).stats
        for make_cache in (PaddedCache, RealignedCache)
    )
    assert realigned.pop("num_padding_kv_slots") == 9 - 6  # both end with 8 new tokens
    assert padded.pop("num_padding_kv_slots") == (9 - 6) + 3 + 4 + 1
    assert realigned == padded


def test_prefill_padding_counts(llama):
    stats = vanilla_padded.run(llama, ragged_prompts([2, 5, 9]), max_new_tokens=1).stats
    assert stats["num_padding_tokens"] == stats["num_padding_kv_slots"] == 7 + 4
    assert stats["num_spec_steps"] == 0


def cut(tokens: list[int], stop: set[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


@pytest.mark.parametrize("baseline", ["hf_generate", "hf_assisted", "vanilla_padded", "realign"])
def test_every_baseline_ends_a_row_after_its_first_end_token(model, expected, baseline):
    stop = {expected[0][3], expected[2][9]}
    wanted = [cut(tokens, stop) for tokens in expected]
    assert len({len(tokens) for tokens in wanted}) > 1  # rows end at different times
    run, options = {
        "hf_generate": (hf_generate.run, {}),
        "hf_assisted": (hf_assisted.run, {"prompt_lookup_num_tokens": 4}),
        "vanilla_padded": (vanilla_padded.run, {}),
        "realign": (realign.run, {}),
    }[baseline]
    result = run(model, ragged_prompts(), max_new_tokens=NUM_NEW, eos_token_id=sorted(stop), **options)
    assert result.tokens == wanted


def test_an_end_token_inside_an_accepted_draft_ends_the_row(model, expected):
    prompts = ragged_prompts()
    truths = {tuple(prompt): truth for prompt, truth in zip(prompts, expected, strict=True)}
    eos = expected[0][3]
    assert eos not in expected[0][:3]  # the first draft of row 0 covers its tokens 1 to 6
    result = vanilla_padded.speculate(
        model, prompts, scripted(truths, [[]] * 5), max_new_tokens=NUM_NEW, num_draft_tokens=6, eos_token_id=eos
    )
    assert result.tokens == [cut(tokens, {eos}) for tokens in expected]


def test_generation_settings_of_the_checkpoint_are_set_aside_and_put_back(llama):
    prompts = ragged_prompts()
    expected = [greedy(llama, prompt) for prompt in prompts]
    settings = llama.generation_config
    settings.update(eos_token_id=expected[0][1], repetition_penalty=1.8, do_sample=True)
    try:
        runs = [
            hf_generate.run(llama, prompts, max_new_tokens=NUM_NEW),
            hf_assisted.run(llama, prompts, max_new_tokens=NUM_NEW, prompt_lookup_num_tokens=4),
            vanilla_padded.run(llama, prompts, max_new_tokens=NUM_NEW),
        ]
        assert all(run.tokens == expected for run in runs)
        assert llama.generation_config is settings
    finally:
        settings.update(eos_token_id=None, repetition_penalty=1.0, do_sample=False)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("bloom", "position_ids"), ("mistral", "DynamicSlidingWindowLayer"), ("mamba", "past_key_values")],
)
def test_vanilla_padded_refuses_what_it_would_get_wrong(model_type, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        vanilla_padded.run(toy_model(model_type), [[1, 2]], max_new_tokens=2)


@pytest.mark.parametrize("run", [hf_generate.run, vanilla_padded.run])
def test_bad_requests_are_refused(run):
    model = toy_model("llama")
    with pytest.raises(InvalidInputError, match="prompts is empty"):
        run(model, [], max_new_tokens=1)
    with pytest.raises(InvalidInputError, match=r"prompts \[1\] are empty"):
        run(model, [[1], []], max_new_tokens=1)
    with pytest.raises(OptionError, match="max_new_tokens is 0"):
        run(model, [[1]], max_new_tokens=0)
    with pytest.raises(UnsupportedModelError, match="training mode"):
        run(model.train(), [[1]], max_new_tokens=1)


def look_up(text: list[int], max_ngram: int, limit: int) -> list[int]:
    """The definition of prompt lookup, by search."""
    for size in range(min(max_ngram, len(text)), 0, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return text[start + size :][:limit]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 29), st.integers(1, 4), st.integers(0, 6))
def test_prompt_lookup_takes_the_longest_and_then_the_latest_match(text, split, max_ngram, limit):
    drafter = PromptLookup(text[: split + 1], max_ngram=max_ngram)
    drafter.extend(text[split + 1 :])
    assert drafter.draft(limit) == look_up(text, max_ngram, limit)
