import pytest

from bench import profiles
from bench.profiles import Profile


def test_the_papers_speedups_follow_from_its_tokens_per_second():
    assert profiles.paper_speedup("unpadded", 1) == profiles.paper_speedup("padded", 1) == 313 / 79
    assert profiles.paper_speedup("padded", 24) == pytest.approx(0.658, abs=1e-3)  # slower than greedy decoding
    assert profiles.paper_speedup("unpadded", 24) == pytest.approx(1.411, abs=1e-3)
    assert profiles.paper_speedup("padded", 3) is None


def test_a_measured_profile_by_hand():
    # 10 steps: 2 had no draft, 3 had two that were wrong at once, 4 accepted the first of two, 1 accepted its only one.
    steps = [(0, 0)] * 2 + [(2, 0)] * 3 + [(2, 1)] * 4 + [(1, 1)]
    profile = Profile.measured(steps, 2)
    assert profile == Profile(right=(5 / 10, 0 / 5), drafted=(8 / 10, 7 / 8))
    assert profile.expected_emitted == pytest.approx(1 + 5 / 10)
    assert profile.expected_drafts == pytest.approx((7 * 2 + 1) / 10)
    assert Profile.measured([(0, 0)], 2) == Profile((0, 0), (0, 0))


def test_lookup_steps_by_hand():
    # After "1 2 3 1" and the first new token 2, lookup knows what followed "1 2": 3 1 2. The text goes on 3 1 9 ...
    steps = profiles.lookup_steps([1, 2, 3, 1], [2, 3, 1, 9, 8, 3, 1, 9, 8, 3], num_draft_tokens=3, max_ngram=2)
    # Neither 9 nor 8 was there before; then 3 was last followed by 1 9 8, which is right.
    assert steps == [(3, 2), (0, 0), (0, 0), (3, 3)]


def test_a_constant_acceptance_emits_what_it_is_asked_for():
    for emitted in (1.0, 2.5, 3.96, 8.0):
        right = profiles.constant_acceptance(emitted, 7)
        assert len(set(right)) == 1
        assert Profile(right, right).expected_emitted == pytest.approx(emitted)
    with pytest.raises(ValueError, match=r"9\.0 tokens"):
        profiles.constant_acceptance(9.0, 7)


def test_the_papers_acceptance_emits_its_speedup_at_batch_1():
    right = profiles.paper_acceptance(7)
    assert Profile(right, right).expected_emitted == pytest.approx(313 / 79)
