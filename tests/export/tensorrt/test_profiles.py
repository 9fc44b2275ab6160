"""`profiles`: every size that a step may have lies in a profile, captured ones in their own."""

import pytest

from emssd_compile.export.tensorrt.profiles import choose, make_profiles
from emssd_compile.runtime.buckets import StepSizes
from tests.export.tensorrt.steps import CHUNK, tiled_step
from tests.passes.graphs import model_with_attention, unpadded

SIZES = (StepSizes(1, 1, 2, 3), StepSizes(9, 9, 6, 3), StepSizes(CHUNK, 9, 51, CHUNK))


@pytest.fixture(scope="module")
def graph():
    return tiled_step().graph


def test_one_profile_spans_the_captured_sizes_and_one_all(graph):
    profiles = make_profiles(graph, SIZES, per_bucket=False)
    assert profiles == [
        {
            "token_range": ((1,), (9,), (9,)),
            "logit_range": ((1,), (9,), (9,)),
            "row_range": ((3,), (3,), (3,)),
            "draft_range": ((2,), (6,), (6,)),
        },
        {
            "token_range": ((1,), (CHUNK,), (CHUNK,)),
            "logit_range": ((1,), (9,), (9,)),
            "row_range": ((1,), (CHUNK,), (CHUNK,)),
            "draft_range": ((1,), (51,), (51,)),
        },
    ]


def test_each_captured_size_may_have_a_profile_of_its_own(graph):
    profiles = make_profiles(graph, SIZES, per_bucket=True)
    assert [profile["token_range"] for profile in profiles] == [((1,),) * 3, ((9,),) * 3, ((1,), (CHUNK,), (CHUNK,))]


def test_the_first_profile_that_covers_a_step_is_chosen(graph):
    profiles = make_profiles(graph, SIZES, per_bucket=False)

    def chosen(*sizes: int) -> int | None:
        return choose(profiles, {name: (size,) for name, size in StepSizes(*sizes)._asdict().items()})

    assert chosen(4, 4, 6, 3) == 0
    assert chosen(4, 4, 6, 4) == 1
    assert chosen(CHUNK, 9, 51, CHUNK) == 1
    assert chosen(CHUNK + 1, 9, 51, CHUNK) is None


def test_lengths_that_sizes_do_not_name_reach_the_largest_step():
    """As in a model without the step around it, whose tokens are inputs."""
    graph_module, _ = unpadded(model_with_attention())
    (profile,) = make_profiles(graph_module.graph, SIZES[-1:], per_bucket=False)
    assert {name: ranges for name, ranges in profile.items() if name == "logit_index"} == {
        "logit_index": ((1,), (CHUNK,), (CHUNK,))
    }
    assert profile["input_ids"] == profile["positions"] == profile["row_ids"] == ((1,), (CHUNK,), (CHUNK,))
