"""Layouts: the room for drafts, who chooses among them, and what is padded."""

import pytest

from emssd_compile.layouts import LAYOUTS
from emssd_compile.policies import AllDrafts, Throughput
from emssd_compile.runtime.step_times import StepTimes


@pytest.fixture
def times() -> StepTimes:
    """Eight tokens take less time than any other number."""
    times = StepTimes(16)
    times.calibrate({1: 1.0, 8: 0.5, 16: 2.0})
    return times


@pytest.mark.parametrize(
    ("name", "policy", "room", "tokens"),
    [("packed", AllDrafts, 5, 6), ("padded", AllDrafts, 12, 6), ("auto", Throughput, 5, 8)],
)
def test_what_a_layout_asks_for(name, policy, room, tokens, times):
    layout = LAYOUTS[name]
    assert type(layout.policy()) is policy
    assert layout.room(3, 4, wanted=5) == room
    assert layout.tokens(6, times) == tokens
    assert layout.is_measured == (name == "auto")
