"""`Planner`: sizes that are exact where all reports were read, enough where some are outstanding; room for drafts."""

import pytest
import torch

from emssd_compile.layouts import LAYOUTS
from emssd_compile.runtime.buckets import StepSizes, decode_buckets, smallest_cover
from emssd_compile.runtime.launch import Report
from emssd_compile.runtime.planning import Planner
from emssd_compile.runtime.requests import Request, Row, RunningStep
from emssd_compile.runtime.step_times import StepTimes

B, K, CHUNK = 3, 4, 64


def _planner(layout: str = "packed", max_depth: int | None = None) -> Planner:
    return Planner(B, K, CHUNK, LAYOUTS[layout], StepTimes(B * (K + 1)), max_depth)


def _row(pending: int, draft_length: int = 0) -> Row:
    return Row(Request(0, torch.zeros(pending, dtype=torch.int64), 9), pending, draft_length)


def _under_way(sizes: StepSizes, *rows: Row | None) -> RunningStep:
    return RunningStep(
        Report(torch.zeros(0), lambda: None), sizes, tuple(row.request if row else None for row in rows), 0.0
    )


@pytest.mark.parametrize(
    ("layout", "rows", "expected"),
    [
        ("packed", [_row(1, 2), None, _row(1, 0)], StepSizes(4, 4, 4, 3)),
        ("padded", [_row(1, 2), None, _row(1, 0)], StepSizes(10, 10, 4, 3)),
        ("packed", [_row(1, 2), _row(20), None], StepSizes(23, 4, 23, 20)),
        # 5 for the second row, and 59 for two prompts that are read side by side: 30 tokens of each.
        ("packed", [_row(100), _row(1, 4), _row(30)], StepSizes(CHUNK, 7, CHUNK + B, 30)),
        ("packed", [_row(100), _row(1, 4), _row(90)], StepSizes(CHUNK, 7, CHUNK + B, 30)),
        ("packed", [_row(1), None, None], StepSizes(1, 1, 2, 2)),
    ],
    ids=["decoding", "padded", "a prompt comes in", "more than the chunk", "two long prompts", "plain decoding"],
)
def test_with_nothing_under_way_sizes_are_what_the_rows_want(layout, rows, expected):
    drafts = sum(row.draft_length for row in rows if row)
    assert _planner(layout).sizes(rows, [], drafts) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([_row(1, 2), None, _row(1, 0)], StepSizes(4, 4, 3 + 3, K + 1)),
        ([_row(1, 4), _row(2), None], StepSizes(7, 6, 3 + 3, K + 1)),
        ([_row(1, 2), _row(20), None], StepSizes(23, 4, 3 + 21, 20)),
    ],
    ids=["decoding", "a short prompt comes in", "a prompt comes in"],
)
def test_a_drafter_of_trees_has_room_to_read_a_path_and_to_draft_a_tree(rows, expected):
    drafts = sum(row.draft_length for row in rows if row)
    assert _planner(max_depth=2).sizes(rows, [], drafts) == expected


def test_a_row_that_decodes_has_one_token_to_read_after_any_step_under_way():
    rows = [_row(1, 2), _row(1, 4), _row(1)]
    launch = _under_way(StepSizes(9, 9, 6, K + 1), *rows)
    for launched in ([launch], [launch, launch]):
        assert _planner().sizes(rows, launched, drafts=5) == StepSizes(8, 8, 6, K + 1)


def test_what_the_drafter_has_not_seen_makes_no_step_larger_that_it_is_left_out_of():
    """Else no bucket would cover such steps, and none would be captured."""
    row = Row(Request(0, torch.zeros(50, dtype=torch.int64), 20), pending=1, unseen=40)
    left_out = _planner().sizes([row], [], drafts=0, is_plain=True)
    assert smallest_cover(decode_buckets(B, K), left_out) is not None
    assert _planner().sizes([row], [], drafts=0).draft_range >= 40 + 1


def test_what_a_step_under_way_reads_of_a_prompt_is_not_planned_again():
    rows = [_row(50), _row(1, 3), None]
    launch = _under_way(StepSizes(24, 4, 24, 24), *rows)
    # A share of 5 tokens for each row, of which the second needs 4, then the rest of the 24 in order: 20 of the prompt.
    assert _planner().sizes(rows, [launch], drafts=0) == StepSizes(30 + 1, 2, 31 + 2, 30)
    # The next reads 24 at most: of the 30 that are left, 19 if the second row has as many drafts as it may.
    second = _under_way(StepSizes(24, 4, 24, 24), *rows)
    assert _planner().sizes(rows, [launch, second], drafts=0) == StepSizes(11 + 1, 2, 12 + 2, 11)


def test_a_step_reads_no_more_of_a_row_than_it_has_room_for():
    rows = [_row(50), None, None]
    launch = _under_way(StepSizes(40, 4, 40, 8), *rows)
    assert _planner().sizes(rows, [launch], drafts=0).token_range == 50 - 8


def test_a_request_that_came_after_the_launch_was_not_read_by_it():
    before, new, other = _row(1, 4), _row(20), _row(10)
    launch = _under_way(StepSizes(16, 8, 16, 10), before, other, None)
    # Of 16 tokens the former request had a share of 5 at most: the other was read, and has the token it then emitted.
    assert _planner().sizes([new, other, None], [launch], drafts=0).token_range == 20 + 1


@pytest.mark.parametrize(
    ("wish", "num_rows", "buckets", "expected"),
    [
        ((6, 3), 3, (), 6),
        ((6, 3), 2, (), 4),
        ((5, 3), 2, (), 4),
        ((6, 3), 2, (1, 4, 8, 15), 6),
        ((0, 3), 3, (1, 4, 8, 15), 1),
        ((0, 3), 3, (1, 3, 8, 15), 0),
        ((6, 3), 3, (1, 4), 6),
        ((12, 3), 2, (16,), 2 * K),
    ],
    ids=["as wanted", "fewer rows", "rounded up", "a bucket's", "left over", "none", "no bucket", "no more than K"],
)
def test_room_is_what_was_wanted_for_so_many_rows_and_what_fits_into_the_same_bucket(wish, num_rows, buckets, expected):
    planner = _planner()
    planner.record_wanted_drafts(*wish)
    assert planner.room(num_rows, [StepSizes(size, size, 2 * B, K + 1) for size in buckets]) == expected


def test_there_is_room_for_all_drafts_before_anything_was_wanted_and_always_where_steps_are_padded():
    assert _planner().room(2, ()) == 2 * K
    padded = _planner("padded")
    padded.record_wanted_drafts(0, 3)
    assert padded.room(2, ()) == 2 * K
