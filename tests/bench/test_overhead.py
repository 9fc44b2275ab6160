"""`bench.overhead`: what is counted as the host's."""

import time

import pytest

import emssd_compile
from bench import overhead, shapes


@pytest.fixture(scope="module")
def fast():
    model = shapes.build("tiny-llama", overhead.parse_arguments([]).device, overhead.parse_arguments([]).dtype)
    fast = emssd_compile.optimize(model, "none", max_batch=2, max_length=64, backend="eager", layout="packed")
    fast.warmup()
    return fast


def test_time_outside_the_step_is_the_hosts_and_time_inside_is_not(fast, monkeypatch):
    prompts = [[5, 6, 7], [8, 9]]
    plain = overhead.decode(fast, prompts, 12)
    assert plain.num_steps == 11  # the first of 12 tokens comes with the prompts
    assert 0 < plain.host_share < 0.9

    planner, pause = fast._engine.planner, plain.seconds / plain.num_steps
    plan = planner.sizes

    def slow_plan(*seen, **options):
        time.sleep(pause)
        return plan(*seen, **options)

    monkeypatch.setattr(planner, "sizes", slow_plan)
    assert overhead.decode(fast, prompts, 12).host_share > plain.host_share + 0.2


def test_the_profile_is_of_all_ops_and_adds_up(fast):
    shares = overhead.profile_ops(fast, [[5, 6, 7]], 4, most=10_000)
    assert sum(shares.values()) == pytest.approx(1)
    assert "emssd::ragged_attention" in shares
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
