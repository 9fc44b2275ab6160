"""Whether running the drafter pays: its own time is part of every step that it is in."""

from __future__ import annotations

from emssd_compile.runtime.step_times import StepTimes

WINDOW, LONG_WINDOW = 8, 32  # steps with the drafter that are watched before it is judged; the second if it waits
DECAY, SLOW_DECAY = 0.9, 0.98  # what is left of a step's evidence after the next one
MARGIN = 0.02  # the drafter is left out where a step without it is faster by more than this share
SHORTEST_PAUSE, LONGEST_PAUSE = 16, 512  # steps without the drafter before it is tried again
PROBE = 4  # steps without the drafter that show what they take


class DraftClock:
    """Chooses between steps with the drafter and steps without it, by tokens per second.

    A step with the drafter that took s seconds and emitted e tokens for A rows is compared with plain steps, which emit
    A tokens in t0(A) seconds: drafting pays where (sum of e) > (sum of A s / t0(A)). If over the last steps it does
    not, the drafter is left out for some steps and then tried again; each time that it fails again it is left out for
    twice as long. So what drafting can cost is a few steps in some hundred.

    Before any plain step was observed, t0 is what they took without texts: no more than they will. A drafter that pays
    even so goes on; where it does not, a few plain steps show what is so, and it is judged again.

    A drafter that remembers what the target says of each token drafts badly for rows that have decoded without it, and
    would be judged by that. So once left out, it waits until no row is busy, or for long; and since that makes a wrong
    verdict cost more, it is watched for longer.

    Args:
        plain: times of steps without the drafter, of up to B tokens.
        waits_for_rows: whether it is such a drafter.

    Attributes:
        is_drafting: whether the next step should run the drafter.
    """

    def __init__(self, plain: StepTimes, *, waits_for_rows: bool = False) -> None:
        self.plain, self._waits_for_rows = plain, waits_for_rows
        self._window, self._decay = (LONG_WINDOW, SLOW_DECAY) if waits_for_rows else (WINDOW, DECAY)
        self.forget()

    def forget(self) -> None:
        """Be as at first: the drafter runs."""
        self._pause = SHORTEST_PAUSE
        self._left = self._longer = 0
        self._start()

    def see_no_rows(self) -> None:
        """All that decode next are new."""
        if self._waits_for_rows and not self.is_drafting and self._left <= 0:
            self._start()

    def _start(self) -> None:
        self.is_drafting = True
        self._emitted = self._plain_tokens = 0.0
        self._num_seen = 0

    def observe(self, *, drafted: bool, num_rows: int, num_emitted: int, seconds: float) -> None:
        """Take in a step in which each row decoded.

        Args:
            drafted: whether the drafter ran in it.
            num_rows: A.
            num_emitted: tokens that it emitted.
            seconds: that it took.
        """
        if drafted != self.is_drafting:
            return  # it was launched before the last change
        if not drafted:
            self.plain.observe(num_rows, seconds)
            self._left -= 1
            if self._left <= -self._longer:
                self._start()
            return
        self._num_seen += 1
        if self._num_seen == 1:
            return  # the drafter had much to read, or a form of the step ran for the first time
        self._emitted = self._decay * self._emitted + num_emitted
        self._plain_tokens = self._decay * self._plain_tokens + num_rows * seconds / self.plain.expected(num_rows)
        if self._num_seen > self._window:
            self._judge()

    def _judge(self) -> None:
        if self._emitted >= (1 - MARGIN) * self._plain_tokens:
            self._pause = SHORTEST_PAUSE
            return
        self.is_drafting = False
        if self.plain.is_observed:
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            self._longer = LONGEST_PAUSE if self._waits_for_rows else 0
        else:
            self._left, self._longer = PROBE, 0
