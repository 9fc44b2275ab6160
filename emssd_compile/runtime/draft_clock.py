"""Whether running the drafter pays: its own time is part of every step that it is in."""

from __future__ import annotations

from emssd_compile.runtime.step_times import StepTimes

WINDOW, LONG_WINDOW = 8, 32  # steps with the drafter that are watched before it is judged; the second if it remembers
DECAY, SLOW_DECAY = 0.9, 0.98  # what is left of a step's evidence after the next one
MARGIN = 0.02  # the drafter is left out where a step without it is faster by more than this share
HOPELESS = 0.6  # with less than this share of the tokens that it would take, half of the steps are enough to judge
SHORTEST_PAUSE, LONGEST_PAUSE = 16, 512  # steps without the drafter before it is tried again
MOST_LOST = 0.15  # what the steps lost that a drafter failed by is at most this share of the pause behind them
PROBE = 4  # steps without the drafter that show what they take


class DraftClock:
    """Chooses between steps with the drafter and steps without it, by tokens per second.

    A step with the drafter that took s seconds and emitted e tokens for A rows is compared with plain steps, which emit
    A tokens in t0(A) seconds: drafting pays where (sum of e) > (sum of A s / t0(A)). If over the last steps it does
    not, the drafter is left out for some steps and then tried again: for twice as many each time that it fails again,
    and for no fewer than make what the trial lost a small share. So drafting soon costs no more than a few steps in a
    hundred, and a drafter whose text begins to repeat itself is back before long.

    Before any plain step was observed, t0 is what they took without texts: no more than they will. A drafter that pays
    even so goes on; where it does not, a few plain steps show what is so, and what was seen of it is judged by that.

    A drafter that remembers what the target says of each token drafts badly for rows that have decoded without it. So
    once left out, it comes back with a new row, and is judged by rows that are whole; when there are none any more, it
    is left out. Since a wrong verdict costs more then, it is watched for longer. The few steps that show what plain
    ones take do no harm worth speaking of.

    Args:
        plain: times of steps without the drafter, of up to B tokens.
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
        self._assumed: float | None = None  # seconds of a plain step, while the first ones are tried
        self._start()

    def see_new_row(self) -> None:
        """One that is whole decodes from the next step on."""
        if self.is_missed and self._left <= 0:
            self._start()

    def _start(self) -> None:
        self.is_drafting, self.is_missed = True, False
        self._emitted = self._plain_tokens = 0.0
        self._num_seen = 0

    def observe(self, *, drafted: bool, num_rows: int, num_whole: int, num_emitted: int, seconds: float) -> None:
        """Take in a step in which each row decoded.

        Args:
            drafted: whether the drafter ran in it.
            num_rows: A.
            num_whole: rows that lack nothing of what the drafter remembers.
            num_emitted: tokens that it emitted for these.
            seconds: that it took.
        """
        if drafted != self.is_drafting:
            return  # it was launched before the last change
        if not drafted:
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
        self._emitted = self._decay * self._emitted + num_emitted
        self._plain_tokens = self._decay * self._plain_tokens + num_whole * seconds / self.plain.expected(num_rows)
        half_seen = self._num_seen > self._window // 2
        if self._num_seen > self._window or (half_seen and self._emitted < HOPELESS * self._plain_tokens):
            if self._pays():
                self._pause = SHORTEST_PAUSE
            else:
                self._leave_out(num_rows)

    def _pays(self) -> bool:
        return self._emitted >= (1 - MARGIN) * self._plain_tokens

    def _leave_out(self, num_rows: int) -> None:
        self.is_drafting = False
        if not self.plain.is_observed:
            self._left, self._assumed = PROBE, self.plain.expected(num_rows)
            return
        lost = (self._plain_tokens - self._emitted) / num_rows  # in plain steps
        self._left = max(self._pause, min(round(lost / MOST_LOST), LONGEST_PAUSE))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self.is_missed = self._remembers

    def _end_pause(self, num_rows: int) -> None:
        if self._assumed is not None:
            self._plain_tokens *= self._assumed / self.plain.expected(num_rows)
            self._assumed = None
            if not self._pays():
                self._leave_out(num_rows)
                return
        self._start()
