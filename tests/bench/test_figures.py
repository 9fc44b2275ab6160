import pytest

from bench.baselines.common import BaselineResult
from bench.figures import Figures, Phase, ratios, speedup

EXPECTED = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
FIRST = [tokens[:1] for tokens in EXPECTED]


def results(tokens: list[list[int]], *seconds: float, **stats: float) -> list[BaselineResult]:
    """One run each; the first is the warm-up."""
    return [BaselineResult(tokens, s, stats=stats) for s in seconds]


def figures(name: str, *seconds: float, prefill: float = 1.0, tokens: list[list[int]] = EXPECTED) -> Figures:
    return Figures.of(name, results(tokens, 99, *seconds), results(FIRST, 99, prefill, prefill, prefill), EXPECTED)


def test_tokens_per_second_are_all_tokens_over_the_median_of_all_but_the_warm_up():
    row = figures("ours_packed", 4, 100, 5)
    assert row.seconds(Phase.TOTAL) == 5
    assert row.tokens_per_second(Phase.TOTAL) == 10 / 5


def test_decoding_is_the_time_after_the_first_token_of_each_row_for_the_other_tokens():
    runs, prefills = results(EXPECTED, 99, 5, 6, 4), results(FIRST, 99, 2, 1, 30)
    row = Figures.of("ours_packed", runs, prefills, EXPECTED)
    assert row.seconds(Phase.DECODE) == 5 - 2
    assert row.tokens_per_second(Phase.DECODE) == 8 / 3


def test_a_prefill_lost_in_noise_gives_no_decoding_speed():
    assert figures("ours_packed", 1, 1, 1, prefill=1.1).tokens_per_second(Phase.DECODE) is None


def test_speedup_is_the_ratio_of_the_tokens_per_second_in_the_table():
    reference, ours = figures("hf_generate", 8, 9, 10), figures("ours_packed", 2, 3, 4)
    assert speedup(ours, reference, Phase.TOTAL) == 3
    assert speedup(ours, reference, Phase.DECODE) == 8 / 2
    assert speedup(ours, None, Phase.TOTAL) is None


def test_a_row_is_identical_only_if_every_run_got_it_right():
    wrong = [EXPECTED[0], [6, 7, 8, 9, 11]]
    runs = [*results(EXPECTED, 99, 1), *results(wrong, 1)]
    row = Figures.of("ours_packed", runs, results(FIRST, 99, 1, 1), EXPECTED)
    assert (row.num_identical, row.identical) == (1, False)
    assert row.agreement == 0.9  # the last token of ten
    row = Figures.of("ours_packed", results(EXPECTED, 99, 1), results([[1], [7]], 99, 1), EXPECTED)
    assert (row.num_identical, row.identical) == (1, False)
    assert figures("ours_packed", 1, 1, 1).identical


def test_ratios_compare_the_best_of_ours_with_each_baseline():
    rows = [
        figures("hf_generate", 12, 12, 12),
        figures("hf_assisted", 6, 6, 6),
        figures("vanilla_padded", 8, 8, 8),
        figures("ours_none", 10, 10, 10),
        figures("ours_packed", 4, 4, 4),
        figures("ours_padded", 3, 3, 3),
        figures("ours_auto", 5, 5, 5),
    ]
    assert ratios(rows, Phase.TOTAL, exact=True) == pytest.approx(
        {
            "best of ours / hf_generate": 12 / 3,
            "best of ours / hf_assisted": 6 / 3,
            "ours_packed / vanilla_padded": 8 / 4,
            "ours_packed / ours_padded": 3 / 4,
            "ours_auto / best of ours_none, ours_packed, ours_padded": 3 / 5,
        }
    )
    assert ratios(rows, Phase.DECODE, exact=True)["best of ours / hf_generate"] == pytest.approx(11 / 2)


def test_ratios_compare_what_ran_at_about_the_same_time():
    """The machine takes twice as long in the second repeat, and three times as long in the third."""
    rows = [figures("vanilla_padded", 8, 16, 24), figures("ours_packed", 4, 8, 4)]
    assert ratios(rows, Phase.TOTAL, exact=True)["ours_packed / vanilla_padded"] == 2  # of the medians it is 4
    assert ratios(rows, Phase.DECODE, exact=True)["ours_packed / vanilla_padded"] == 7 / 3


def test_wrong_tokens_win_no_ratio_where_every_token_must_be_right():
    rows = [
        figures("hf_generate", 12, 12, 12),
        figures("ours_none", 6, 6, 6),
        figures("ours_packed", 1, 1, 1, tokens=[EXPECTED[0], EXPECTED[0]]),
    ]
    name = "best of ours / hf_generate"
    assert ratios(rows, Phase.TOTAL, exact=True)[name] == 2
    assert ratios(rows, Phase.TOTAL, exact=False)[name] == 12


def test_what_failed_takes_part_in_no_ratio_and_is_recorded_with_its_reason():
    failed = Figures("ours_packed", 2, failure="OutOfMemoryError: no room")
    rows = [figures("hf_generate", 12, 12, 12), failed]
    assert ratios(rows, Phase.TOTAL, exact=False) == {}
    assert failed.record(rows[0]) == {"candidate": "ours_packed", "failure": "OutOfMemoryError: no room"}


def test_plain_decoding_emits_one_token_a_row_and_step():
    assert figures("hf_generate", 1, 1).acceptance_length == 1
    runs = results(EXPECTED, 99, 1, mean_acceptance_length=2.5, num_padding_tokens=7)
    row = Figures.of("vanilla_padded", runs, results(FIRST, 99, 1), EXPECTED)
    assert (row.acceptance_length, row.num_padding_tokens) == (2.5, 7)
