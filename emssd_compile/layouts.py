"""Layouts: how many drafts a step has room for, and who chooses among them. One class each, one line in `LAYOUTS`."""

from __future__ import annotations

from emssd_compile.policies import AllDrafts, LengthPolicy, Throughput
from emssd_compile.runtime.step_times import StepTimes


class PackedLayout:
    """Every row verifies what its drafter proposes, and a step holds those tokens and no others.

    Where the host is a step behind, room is made for as many drafts as it last heard of: what suddenly exceeds that is
    cut evenly, and the step is rounded up to a captured size.
    """

    is_measured = False  # whether steps are timed, for `policy` and `tokens`

    def policy(self) -> LengthPolicy:
        """What chooses draft lengths on the device."""
        return AllDrafts()

    def room(self, num_rows: int, num_draft_tokens: int, wanted: int) -> int:
        """For how many drafts of all rows together a step has room, where `wanted` are asked for."""
        return wanted

    def tokens(self, needed: int, times: StepTimes) -> int:
        """T of a step that needs so many tokens; more is inert tail."""
        return needed


class PaddedLayout(PackedLayout):
    """Every row takes K + 1 tokens, used or not: the sizes of a step depend on nothing but the number of rows."""

    def room(self, num_rows: int, num_draft_tokens: int, wanted: int) -> int:
        """K drafts for each row, whether it has them or not."""
        return num_rows * num_draft_tokens


class AutoLayout(PackedLayout):
    """What was measured to be fastest: draft lengths by `Throughput`, padding where a larger step takes less time."""

    is_measured = True

    def policy(self) -> LengthPolicy:
        """Draft lengths by measured times and acceptance."""
        return Throughput()

    def tokens(self, needed: int, times: StepTimes) -> int:
        """`needed`, or a larger size that was measured to take clearly less time."""
        return times.cheapest(needed)


LAYOUTS = {"auto": AutoLayout(), "packed": PackedLayout(), "padded": PaddedLayout()}
