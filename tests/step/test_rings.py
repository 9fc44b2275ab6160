"""`rings`: how large they are, and what they still hold."""

import pytest

from emssd_compile.step.rings import Rings


@pytest.mark.parametrize(("window", "num_new", "slots"), [(5, 4, 8), (6, 4, 12), (1, 1, 4), (64, 1, 64), (61, 5, 68)])
def test_a_ring_has_a_window_and_what_a_step_may_add(window: int, num_new: int, slots: int):
    rings = Rings({"k": window}, num_new, block_size=4)
    assert rings.size("k") == slots
    assert rings.row_blocks("k") == slots // 4


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("num_new", [1, 2, 5])
def test_what_a_step_sees_is_there_when_it_has_written(window: int, num_new: int):
    """Slot by slot: the first token of a step sees its window, whatever the step has added."""
    rings = Rings({"k": window}, num_new, block_size=2)
    size = rings.size("k")
    held: dict[int, int] = {}
    for length in range(30):
        held |= {slot % size: slot for slot in range(length + num_new)}
        seen = range(max(length - window + 1, 0), length + num_new)
        assert [held[slot % size] for slot in seen] == [*seen]


@pytest.mark.parametrize("num_read", [0, 2, 9, 20])
def test_they_hold_what_is_seen_until_it_is_written_over(num_read: int):
    rings = Rings({"k": 5, "v": 3}, 4, block_size=4)
    for written in range(num_read, 60):
        kept = all(
            written - rings.size(name) <= slot
            for name, window in rings.reaches.items()
            for slot in range(max(num_read - window + 1, 0), num_read)
        )
        if num_read:  # of nothing, anything is kept
            assert rings.hold(num_read, written) == kept, written
