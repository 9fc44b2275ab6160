"""Whether running the drafter pays: its own time is part of every step that it is in."""

from __future__ import annotations

from emssd_compile.runtime.step_times import StepTimes

WINDOW, LONG_WINDOW = 8, 32  # steps with the drafter that are watched before it is judged; the second if it remembers
DECAY, SLOW_DECAY = 0.9, 0.98  # what is left of a step's evidence after the next one
MARGIN = 0.02  # the drafter is left out where a step without it is faster by more than this share
HOPELESS = 0.6  # with less than this share of what it would take, half of the steps are enough to judge
SHORTEST_PAUSE, LONGEST_PAUSE = 16, 512  # steps without the drafter before it is tried again
MOST_LOST = 0.15  # what the steps lost that a drafter failed by is at most this share of the pause behind them
PROBE = 5  # steps without the drafter that show what they take


class DraftClock:
    """Chooses between steps with the drafter and plain ones, by tokens per second.

    A plain step is one without the drafter, or without what is costly of it. A step with the drafter that took s
    seconds for A rows is compared with plain steps that emit the same tokens, and take t0(A) seconds each. If they emit
    p tokens of a row where it emits c, they are c / p steps of that row: drafting pays where (sum of c / p over rows
    and steps) > (sum of A s / t0(A) over steps). Without any drafts p is 1. If over the last steps it does not pay, the
    drafter is left out for some steps and then tried again: for twice as many each time that it fails again, and for no
    fewer than make what the trial lost a small share. So drafting soon costs no more than a few steps in a hundred, and
    a drafter whose text begins to repeat itself is back before long.

    Before any plain step was observed, t0 is what they took without texts: no more than they will. A drafter that pays
    even so goes on; where it does not, a few plain steps show what is so, and what was seen of it is judged by that.

    A drafter that remembers what the target says of each token drafts badly for rows that have decoded without it. So
    once left out, it comes back with a new row, and is judged by rows that are whole; when there are none any more, it
    is left out. Since a wrong verdict costs more then, it is watched for longer. The few steps that show what plain
    ones take do no harm worth speaking of.

    Args:
        plain: times of plain steps, by the rows that decode, up to B.
        remembers: whether it is such a drafter.

    Attributes:
        is_drafting: whether the next step should run the drafter.
        is_missed: whether rows that decode in the next step will lack what the drafter would have read.
    """

    def __init__(self, plain: StepTimes, *, remembers: bool = False) -> None:
        self.plain, self._remembers = plain, remembers
        self._window, self._decay = (LONG_WINDOW, SLOW_DECAY) if remembers else (WINDOW, DECAY)
        self.forget()

    def forget(self) -> None:
        """Be as at first: the drafter runs."""
        self._pause = SHORTEST_PAUSE
        self._left = 0
        self._was_plain = False  # whether the last step was a plain one
        self._assumed: float | None = None  # seconds of a plain step, while the first ones are tried
        self._start()

    def see_new_row(self) -> None:
        """One that is whole decodes from the next step on."""
        if self.is_missed and self._left <= 0:
            self._start()

    def _start(self) -> None:
        self.is_drafting, self.is_missed = True, False
        self._worth = self._needed = 0.0
        self._num_seen = 0

    def observe(self, *, drafted: bool, num_rows: int, num_whole: int, worth: float, seconds: float) -> None:
        """Take in a step in which each row decoded.

        Args:
            drafted: whether the drafter ran in it, with all that is costly of it.
            num_rows: A.
            num_whole: rows that lack nothing of what the drafter remembers.
            worth: how many plain steps of a row would have emitted what it emitted for these, all together.
            seconds: that it took.
        """
        if drafted != self.is_drafting:
            return  # it was launched before the last change
        was_plain, self._was_plain = self._was_plain, not drafted
        if not drafted:
            if was_plain:  # the first one after others has to fetch its weights, and may run for the first time
                self.plain.observe(num_rows, seconds)
            self._left -= 1
            if self._left <= 0 and not self.is_missed:
                self._end_pause(num_rows)
            return
        if not num_whole:  # nor will any of them be
            self.is_drafting, self.is_missed = False, True
            return
        self._num_seen += 1
        if self._num_seen == 1:
            return  # the drafter had much to read, or a form of the step ran for the first time
        self._worth = self._decay * self._worth + worth
        self._needed = self._decay * self._needed + num_whole * seconds / self.plain.expected(num_rows)
        half_seen = self._num_seen > self._window // 2
        if self._num_seen > self._window or (half_seen and self._worth < HOPELESS * self._needed):
            if self._pays():
                self._pause = SHORTEST_PAUSE
            else:
                self._leave_out(num_rows)

    def _pays(self) -> bool:
        return self._worth >= (1 - MARGIN) * self._needed

    def _leave_out(self, num_rows: int) -> None:
        self.is_drafting = False
        if not self.plain.is_observed:
            self._left, self._assumed = PROBE, self.plain.expected(num_rows)
            return
        lost = (self._needed - self._worth) / num_rows  # in plain steps
        self._left = max(self._pause, min(round(lost / MOST_LOST), LONGEST_PAUSE))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self.is_missed = self._remembers

    def _end_pause(self, num_rows: int) -> None:
        if self._assumed is not None:
            self._needed *= self._assumed / self.plain.expected(num_rows)
            self._assumed = None
            if not self._pays():
                self._leave_out(num_rows)
                return
        self._start()
