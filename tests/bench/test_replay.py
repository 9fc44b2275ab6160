from types import SimpleNamespace

import pytest
import torch

import emssd_compile
from bench import shapes
from bench.profiles import Profile
from bench.replay import ReplayDrafter, draw, foretell, plant_continuation
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.layouts import LAYOUTS
from tests.bench.test_baselines import greedy
from tests.drafters.contexts import target_of

ROWS, K, NEW = 6, 4, 40
RIGHT = (0.9, 0.7, 0.5, 0.8)
ALL = (1.0,) * 4
PROFILE = Profile(RIGHT, drafted=(0.95, 0.6, 0.9, 1.0))


def planted(name):
    model = shapes.build(name)
    plant_continuation(model)
    return model


@pytest.fixture(scope="module")
def model():
    return planted("tiny-llama")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4000, (length,), generator=generator).tolist() for length in (5, 9, 2, 30, 17, 12)]


@pytest.fixture(scope="module")
def replay():
    return ReplayDrafter(K, ROWS, NEW)


@pytest.fixture(scope="module")
def fast(model, replay):
    return emssd_compile.optimize(model, replay, max_batch=ROWS, max_length=80, backend="eager", layout="packed")


def decode(fast, replay, prompts, continuations, profile):
    """New tokens of each row; what was accepted is left in `fast.stats`."""
    replay.load(prompts, continuations, profile)
    fast.stats.reset()
    rows = fast.generate(prompts, max_new_tokens=NEW, eos_token_id=None)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.fixture(scope="module")
def continuations(model, prompts):
    return [greedy(model, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_a_planted_model_says_the_next_token_far_from_any_tie(name, prompts):
    model = planted(name)
    assert [greedy(model, prompt, NEW) for prompt in prompts] == [
        [(prompt[-1] + 1 + i) % 4096 for i in range(NEW)] for prompt in prompts
    ]
    with torch.inference_mode():
        best, second = model(torch.tensor([prompts[3]])).logits.topk(2).values.unbind(-1)
    assert (second < 0.8 * best).all()  # bfloat16 rounds by 0.4%


def test_the_tokens_stay_the_models_own_whatever_is_spoilt(fast, replay, prompts, continuations):
    for profile in (PROFILE, Profile((0.0,) * K, ALL), Profile(ALL, ALL)):
        assert decode(fast, replay, prompts, continuations, profile) == continuations
    lies = [[7] * NEW for _ in prompts]
    assert decode(fast, replay, prompts, lies, Profile(ALL, ALL)) == continuations


@pytest.mark.parametrize("profile", [PROFILE, Profile(RIGHT, ALL), Profile(RIGHT, RIGHT)])
def test_steps_accept_what_the_host_foretells_however_many_more_drafts_there_are(
    fast, replay, prompts, continuations, profile
):
    decode(fast, replay, prompts, continuations, profile)
    steps = [foretell(draws, profile, NEW) for draws in draw(ROWS, NEW)]
    assert all(sum(counts) == NEW - 1 for counts in steps)
    assert fast.stats.num_row_steps == sum(map(len, steps))
    assert fast.stats.num_accepted_draft_tokens == sum(sum(counts) - len(counts) for counts in steps)


@pytest.mark.parametrize(("acceptance", "emitted"), [([0.0] * K, 1.0), ([1.0] * K, K + 1.0)])
def test_never_and_always(fast, replay, prompts, continuations, acceptance, emitted):
    decode(fast, replay, prompts, continuations, Profile(tuple(acceptance), ALL))
    assert fast.stats.num_row_steps / ROWS == -(-(NEW - 1) // emitted)


def test_packed_inputs_hold_the_drafts_there_are_and_padded_ones_room_for_all(
    fast, replay, prompts, continuations, monkeypatch
):
    fed = {}
    for layout in ("packed", "padded"):
        monkeypatch.setattr(fast._engine.planner, "layout", LAYOUTS[layout])
        decode(fast, replay, prompts, continuations, Profile((0.0,) * K, drafted=(0.5, 0.0, 0.0, 0.0)))
        fed[layout] = (fast.stats.num_draft_tokens, fast.stats.num_padding_tokens)
    # No draft is right: every row decodes alone, and makes a draft in half of its steps.
    drafts = fed["packed"][0]
    assert fed["packed"] == (drafts, 0)
    assert 0.35 < drafts / (ROWS * NEW) < 0.65
    # The prompts are read in one step, without drafts; K places a row in every step.
    assert fed["padded"] == (drafts, ROWS * NEW * K - drafts)


def test_as_many_drafts_are_made_as_asked_for():
    rows, length = 200, 10
    replay = ReplayDrafter(K, rows, length)
    replay.prepare(target_of(None, rows, length, 4096))
    replay.load([[1]] * rows, [[7] * length] * rows, PROFILE)
    known = torch.ones(rows, dtype=torch.int64)
    there = replay(SimpleNamespace(known=known)).tokens >= 0
    lengths = there.long().cumprod(1).sum(1).double()
    error = float(lengths.std()) / rows**0.5
    assert abs(float(lengths.mean()) - PROFILE.expected_drafts) < 4 * error


def test_the_acceptance_asked_for_is_reached():
    accepted = torch.tensor([count - 1 for draws in draw(64, 500) for count in foretell(draws, PROFILE, 500)])
    for draft, wanted in enumerate(RIGHT):
        tried = accepted >= draft
        share = float((accepted[tried] > draft).float().mean())
        error = (wanted * (1 - wanted) / int(tried.sum())) ** 0.5
        assert abs(share - wanted) < 4 * error


def test_what_does_not_fit_is_refused(replay):
    with pytest.raises(DrafterError, match="made for 6 rows; max_batch is 2"):
        replay.prepare(target_of(None, 2, 80, 4096))
    with pytest.raises(OptionError, match="7 prompts and 7 continuations for 6 rows"):
        replay.load([[1]] * 7, [[1]] * 7, PROFILE)
    with pytest.raises(OptionError, match="up to 41 tokens and 4 probabilities"):
        replay.load([[1]], [[1] * 41], PROFILE)
    with pytest.raises(OptionError, match="1 tokens and 1 probabilities"):
        replay.load([[1]], [[1]], Profile((0.5,), (1.0,)))
