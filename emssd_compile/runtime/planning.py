"""How large the next step must be, as far as the host can know: with reports outstanding, at most how large."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from emssd_compile.layouts import PackedLayout
from emssd_compile.runtime.buckets import StepSizes, smallest_cover
from emssd_compile.runtime.requests import Row, RunningStep
from emssd_compile.runtime.step_times import StepTimes
from emssd_compile.step.drafting import most_unread


class Planner:
    """Chooses the sizes of steps, and how many drafts the device may choose to verify where the host is behind.

    Args:
        num_rows: B.
        num_draft_tokens: K.
        chunk: most packed tokens of a step.
        layout: how much room a step gives to drafts.
        times: what steps take, for the layout.
        max_depth: D, where drafts are trees; None for chains.
    """

    def __init__(
        self,
        num_rows: int,
        num_draft_tokens: int,
        chunk: int,
        layout: PackedLayout,
        times: StepTimes,
        max_depth: int | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.num_draft_tokens = num_draft_tokens
        self.chunk = chunk
        self.layout = layout
        self.times = times
        self.max_depth = max_depth
        self.forget()

    def forget(self) -> None:
        """Know nothing of what rows want: all they can."""
        self._wanted = (self.num_draft_tokens, 1)  # (drafts, rows that wanted so many together), as last reported

    def record_wanted_drafts(self, num_drafts: int, num_rows: int) -> None:
        """Take what so many drafting rows (at least one) last wanted together."""
        self._wanted = (num_drafts, num_rows)

    def sizes(
        self, rows: Sequence[Row | None], launched: Collection[RunningStep], drafts: int, *, is_plain: bool = False
    ) -> StepSizes:
        """Sizes of the next step: enough for what its rows may want, within the chunk.

        Args:
            rows: at least one of them busy.
            launched: steps whose reports have not been read, oldest first; without any, the sizes are exact.
            drafts: how many the step verifies, or may verify.
            is_plain: whether the drafter is left out of it; else it reads what it has not seen.
        """
        pending = self._pending_at_launch(rows, launched)
        drafts = self.layout.room(len(pending), self.num_draft_tokens, drafts)
        needed = min(sum(pending) + drafts, self.chunk)
        # After the step a drafter that reads along has at most this left to read: of a row that reads its prompt, what
        # this step feeds and the token after it.
        reading = sum(max(count + 1, most_unread(self.max_depth)) for count in pending)
        busy = zip((row for row in rows if row), pending, strict=True)
        # Fed by plain steps, or by other rows.
        unseen = [(row.unseen, count) for row, count in busy if row.unseen and not is_plain]
        reading += sum(count for count, _ in unseen)
        catching_up = max((count + 1 + behind for behind, count in unseen), default=0)
        return StepSizes(
            token_range=self.layout.tokens(needed, self.times),
            logit_range=min(len(pending) + drafts, needed),
            draft_range=min(reading, self.chunk + self.num_rows),
            row_range=max(self._row_range(rows, pending, needed, exact=not launched), min(catching_up, self.chunk)),
        )

    def room(self, num_rows: int, buckets: Sequence[StepSizes]) -> int:
        """How many drafts a step of so many busy rows may verify: what they last wanted, and what a bucket has left."""
        drafts, drafting = self._wanted
        room = self.layout.room(num_rows, self.num_draft_tokens, -(-drafts * num_rows // drafting))
        tokens = num_rows + room
        bucket = smallest_cover(buckets, StepSizes(tokens, tokens, 0, 0))
        return min(bucket.token_range if bucket else tokens, num_rows * (self.num_draft_tokens + 1)) - num_rows

    def _row_range(self, rows: Sequence[Row | None], pending: Sequence[int], needed: int, *, exact: bool) -> int:
        """The most tokens that one row may take.

        Where the host knows what each row wants, it is the least with which the step is filled: rows then read their
        prompts side by side, and a target that gives each row as much room as the longest takes wastes little.
        """
        if not exact:  # a row that still has to read more than one token has drafted nothing
            return min(max(self.num_draft_tokens + 1, *pending), self.chunk)
        wanted = sorted(row.pending + row.draft_length for row in rows if row)
        # A drafter that reads along takes two tokens, or a tree.
        left, least = needed, self.num_draft_tokens + 1 if self.max_depth else min(2, self.num_draft_tokens + 1)
        for index, count in enumerate(wanted):
            share = -(-left // (len(wanted) - index))
            if count >= share:
                return max(share, least)
            left -= count
        return max(wanted[-1], least)

    def _pending_at_launch(self, rows: Sequence[Row | None], launched: Iterable[RunningStep]) -> list[int]:
        """What each busy row knows but will not have read when the next step starts; with steps under way, at most."""
        pending = [row.pending if row else 0 for row in rows]
        drafts = [row.draft_length if row else 0 for row in rows]
        for launch in launched:
            most = self.num_draft_tokens if launch.drafted else 0
            share = most + 1
            # A request that came since the launch took no part in it; the one it followed decoded, or had ended.
            stays = [row is not None and row.request is it for row, it in zip(rows, launch.requests, strict=True)]
            wanted = [
                min(pending[b] + min(drafts[b], most), launch.sizes.row_range) if stays[b] else share if request else 0
                for b, request in enumerate(launch.requests)
            ]
            # As `pack` does: a share for each row, then the rest in order. Where none are verified, all are dropped.
            first = _serve_in_order([min(count, share) for count in wanted], launch.sizes.token_range)
            left = launch.sizes.token_range - sum(first)
            rest = _serve_in_order([a - b for a, b in zip(wanted, first, strict=True)], left)
            fed = [(a + b) * stay for a, b, stay in zip(first, rest, stays, strict=True)]
            pending = [max(a - b, min(a, 1)) for a, b in zip(pending, fed, strict=True)]
            drafts = [most] * self.num_rows  # what the step drafts is not known yet
        return [count for count, row in zip(pending, rows, strict=True) if row]


def _serve_in_order(wanted: Sequence[int], budget: int) -> list[int]:
    """Serve rows in order until the budget is spent."""
    granted = []
    for count in wanted:
        granted.append(min(count, budget))
        budget -= granted[-1]
    return granted
