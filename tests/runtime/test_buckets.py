"""Which sizes are captured, and which of them a step takes."""

import pytest

from emssd_compile.runtime.buckets import StepSizes, decode_buckets, smallest_cover


def test_the_buckets_of_three_rows_with_three_drafts():
    assert decode_buckets(3, 3) == (
        *(StepSizes(1, 1, 2, 4), StepSizes(2, 2, 4, 4), StepSizes(3, 3, 6, 4), StepSizes(4, 4, 6, 4)),
        *(StepSizes(6, 6, 6, 4), StepSizes(8, 8, 6, 4), StepSizes(12, 12, 6, 4)),
    )


@pytest.mark.parametrize(("rows", "drafts"), [(1, 0), (1, 7), (8, 0), (8, 4), (24, 7), (64, 4)])
def test_a_decode_step_takes_at_most_half_more_than_it_wants(rows, drafts):
    buckets = decode_buckets(rows, drafts)
    for active in range(1, rows + 1):
        for tokens in range(active, active * (drafts + 1) + 1):
            bucket = smallest_cover(buckets, StepSizes(tokens, tokens, 2 * active, drafts + 1))
            assert bucket is not None
            assert bucket.token_range <= max(1.5 * tokens, tokens + 1)
            assert bucket.logit_range == bucket.token_range


def test_of_a_tree_a_drafter_may_have_a_whole_path_and_the_token_after_it_to_read():
    assert decode_buckets(2, 6, max_depth=2)[-3:] == (
        *(StepSizes(8, 8, 2 * 3, 7), StepSizes(12, 12, 2 * 3, 7), StepSizes(14, 14, 2 * 3, 7)),
    )


@pytest.mark.parametrize(("rows", "drafts"), [(1, 0), (8, 4), (24, 7)])
def test_a_full_batch_is_not_rounded(rows, drafts):
    full = StepSizes(rows * (drafts + 1), rows * (drafts + 1), 2 * rows, drafts + 1)
    assert smallest_cover(decode_buckets(rows, drafts), full) == full


def test_the_buckets_are_few():
    assert len(decode_buckets(64, 7)) <= 20


def test_a_chunk_of_a_prompt_is_covered_by_none():
    buckets = decode_buckets(2, 3)
    assert smallest_cover(buckets, StepSizes(9, 2, 2, 4)) is None
    assert smallest_cover(buckets, StepSizes(8, 8, 5, 4)) is None
    assert smallest_cover(buckets, StepSizes(8, 2, 2, 5)) is None
    assert smallest_cover((), StepSizes(1, 1, 1, 1)) is None
