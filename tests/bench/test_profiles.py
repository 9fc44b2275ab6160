import pytest

from bench import profiles


def test_the_papers_speedups_follow_from_its_tokens_per_second():
    assert profiles.paper_speedup("unpadded", 1) == profiles.paper_speedup("padded", 1) == 313 / 79
    assert profiles.paper_speedup("padded", 24) == pytest.approx(0.658, abs=1e-3)  # slower than greedy decoding
    assert profiles.paper_speedup("unpadded", 24) == pytest.approx(1.411, abs=1e-3)
    assert profiles.paper_speedup("padded", 3) is None


def test_a_measured_profile_by_hand():
    # 10 row steps: 2 had no draft, 3 drafts were rejected at once, 4 accepted one draft, 1 accepted both.
    profile = profiles.measured_profile([3, 4, 1], 10)
    assert profile == [5 / 10, 1 / 5]
    assert profiles.expected_emitted(profile) == pytest.approx(1 + (4 * 1 + 1 * 2) / 10)
    assert profiles.measured_profile([4, 0, 0], 4) == [0, 0]


def test_a_constant_profile_emits_what_it_is_asked_for():
    for emitted in (1.0, 2.5, 3.96, 8.0):
        profile = profiles.constant_profile(emitted, 7)
        assert len(set(profile)) == 1
        assert profiles.expected_emitted(profile) == pytest.approx(emitted)
    with pytest.raises(ValueError, match=r"9\.0 tokens"):
        profiles.constant_profile(9.0, 7)


def test_the_papers_profile_emits_its_speedup_at_batch_1():
    assert profiles.expected_emitted(profiles.paper_profile(7)) == pytest.approx(313 / 79)
