"""What a step costs, by the number of its packed tokens: measured before decoding, corrected while it goes on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

DECAY = 0.97  # what is left of an observation after the next one
PRIOR = 0.1  # weight of the measured curve's slope, as a share of the square of its mean
DISTURBED = 2  # a step that took so many times as long as expected counts as this many times
WORTH_PADDING = 0.9  # a larger step must take less than this share of the time of the exact one


class StepTimes:
    """The time t(n) of a step of n packed tokens, for n up to `most`.

    The shape of the curve is measured once (`calibrate`) with empty rows, which leaves out what attention adds as texts
    grow. So while decoding goes on, a straight line from measured to observed times, t = a + b * measured, is fitted by
    least squares, old observations fading; b is drawn towards 1 as long as the sizes observed do not tell.

    Args:
        most: largest number of tokens of interest.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._sizes: list[int] = []
        self._measured = [1.0] * (most + 1)
        self._sums = [0.0] * 5  # of 1, x, y, x * x, x * y over observations; x measured and y observed

    def calibrate(self, seconds: Mapping[int, float], *, is_stepped: bool = False) -> None:
        """Take the measured seconds of some sizes.

        Sizes between them are interpolated; or, if `is_stepped`, no others are run: a step takes the next larger one.
        """
        self._sizes = sorted(seconds)
        between = _next_larger if is_stepped else _interpolate
        self._measured = [between(n, self._sizes, seconds) for n in range(self.most + 1)]
        self._sums = [0.0] * 5

    def observe(self, tokens: int, seconds: float) -> float:
        """Take in that a step of `tokens` took `seconds`; one that took much longer than expected was disturbed.

        Returns:
            The seconds that it counts as.
        """
        counted = min(seconds, DISTURBED * self.expected(tokens))
        if self._sizes and tokens <= self.most:
            x, y = self._measured[tokens], counted
            self._sums = [DECAY * held + new for held, new in zip(self._sums, (1.0, x, y, x * x, x * y), strict=True)]
        return counted

    def table(self) -> Tensor:
        """float32 `[most + 1]`, seconds of a step of n tokens."""
        return torch.tensor([self.corrected(measured) for measured in self._measured], dtype=torch.float32)

    def expected(self, tokens: int) -> float:
        """Seconds of a step of so many tokens."""
        return self.corrected(self._measured[min(tokens, self.most)])

    def corrected(self, measured: float) -> float:
        """What steps take while decoding that took so long when they were measured."""
        offset, slope = self._line()
        return offset + slope * measured

    @property
    def is_observed(self) -> bool:
        """Whether any step was observed."""
        return self._sums[0] > 0

    def cheapest(self, tokens: int) -> int:
        """The number of tokens, at least `tokens`, whose step takes the least time.

        It is a larger one only if that was measured to be clearly faster, as uniform sizes are on some machines.
        """
        larger = self._sizes[bisect_left(self._sizes, tokens) :]
        best = min(larger, key=self._measured.__getitem__, default=tokens)
        return best if best > tokens and self._measured[best] < WORTH_PADDING * self._measured[tokens] else tokens

    def _line(self) -> tuple[float, float]:
        """The a and b of the class's docstring."""
        count, *sums = self._sums
        if count == 0:
            return 0.0, 1.0
        x, y, xx, xy = (total / count for total in sums)
        prior = PRIOR * x * x
        slope = max((xy - x * y + prior) / (xx - x * x + prior), 0.0)
        offset = y - slope * x
        return (offset, slope) if offset >= 0 else (0.0, y / x)


def assumed_times(most: int, device: torch.device) -> StepTimes:
    """Times where no clock is to be asked: a step costs something, and each of its tokens the same share of that.

    What it costs without tokens is mostly reading the weights. A CPU multiplies in the meantime for a few tokens, a GPU
    for a hundred or so.
    """
    free = 8 if device.type == "cpu" else 128
    times = StepTimes(most)
    times.calibrate({1: free + 1.0, most: float(free + most)})
    return times


def sizes_to_measure(most: int) -> list[int]:
    """Numbers of tokens, ascending, between which times may be interpolated: 1, 2, 4, ... and `most`.

    The engine may have room for many rows and serve few: so they must be close at the lower end, where the curve bends
    (one token is a matrix-vector product), and not only at multiples of the rows.
    """
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def _interpolate(tokens: int, sizes: list[int], seconds: Mapping[int, float]) -> float:
    """Piecewise linear through (size, seconds); before the first and behind the last size it is level."""
    right = bisect_left(sizes, tokens)
    if right == 0 or right == len(sizes):
        return seconds[sizes[min(right, len(sizes) - 1)]]
    low, high = sizes[right - 1], sizes[right]
    share = (tokens - low) / (high - low)
    return seconds[low] + share * (seconds[high] - seconds[low])


def _next_larger(tokens: int, sizes: list[int], seconds: Mapping[int, float]) -> float:
    """The seconds of the smallest size that holds `tokens`; behind the last size it is level."""
    return seconds[sizes[min(bisect_left(sizes, tokens), len(sizes) - 1)]]
