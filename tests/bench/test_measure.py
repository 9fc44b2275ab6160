import pytest
import torch

import emssd_compile
from bench import measure, shapes
from bench.replay import FullWidthDrafter, plant_continuation
from emssd_compile.runtime.requests import Request
from tests.bench.test_baselines import greedy

K, NEW = 3, 6


@pytest.fixture(scope="module")
def model():
    return shapes.build("tiny-llama")


@pytest.fixture(scope="module")
def fast(model):
    return emssd_compile.optimize(model, max_batch=3, max_length=60, backend="eager", layout="packed")


def test_resuming_gives_the_tokens_of_the_prompts_just_read_again_and_again(model, fast):
    prompts = [[5, 6, 7, 5, 6], list(range(20, 40)), [9, 8]]
    expected = [greedy(model, prompt, NEW) for prompt in prompts]
    fast.generate(prompts, max_new_tokens=1, eos_token_id=None)
    for _ in range(2):
        run = measure.resume(fast, prompts, NEW)
        assert run.tokens == expected
        assert len(prompts) * (NEW - 1) >= run.num_row_steps - len(prompts)
        assert run.num_steps <= NEW
    assert measure.resume(fast, prompts, 1).tokens == [tokens[:1] for tokens in expected]


def test_nothing_is_read_when_resuming(fast):
    engine = fast._engine
    engine.counters()
    request = Request(0, torch.arange(40), max_new_tokens=2, num_read=39)
    assert sum(1 for _ in engine.run([request])) == 2
    # The prompt's last token, then the one before the last new one, without drafts.
    assert engine.counters()[0]["num_fed_tokens"] == 2


def test_a_steady_step_is_the_difference_of_two_runs_over_the_difference_of_their_steps(monkeypatch):
    model = shapes.build("tiny-llama")
    plant_continuation(model)
    fast = emssd_compile.optimize(
        model, FullWidthDrafter(K), max_batch=2, max_length=60, backend="eager", layout="packed"
    )
    runs = []
    resume = measure.resume

    def slow_start(*arguments):
        run = resume(*arguments)
        runs.append(run)
        return measure.Run(run.tokens, 100 + 0.5 * run.num_steps, run.num_steps, run.num_row_steps, run.num_tokens)

    monkeypatch.setattr(measure, "resume", slow_start)
    step = measure.steady_step(fast, 2, 20, 10)
    assert step.seconds == pytest.approx(0.5)
    # The short run emits K + 2 tokens, over contexts of 20, 21, ...; the long one goes on over 10 more.
    assert step.context == sum(range(20 + K + 2, 20 + K + 2 + 10)) / 10
    assert runs[1].num_steps - runs[0].num_steps == 10  # one token a step: every draft was wrong
    assert runs[1].num_tokens - runs[0].num_tokens == 10 * 2 * (K + 1)  # at full width


def test_bandwidth_and_call_times_are_positive_and_plausible():
    device = torch.device("cpu")
    assert 1e8 < measure.memory_bandwidth(device, 1) < 1e13
    small, large = torch.ones(16), torch.ones(2**20)
    assert measure.call_seconds(small.sin, device, 1e-3) < measure.call_seconds(large.sin, device, 1e-3)
