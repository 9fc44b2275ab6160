"""Which of several forms of an op is fastest: measured once for a class of calls, then remembered.

The first call of a class, which `OptimizedModel.warmup` makes, runs every form on the true tensors and waits for the
device. While a CUDA graph is captured nothing can be measured: a class that was not met before gets the first form.
Within `standard_forms` all classes do.
"""

import logging
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)
_RUNS = 5

Call = Callable[[], Tensor]

_is_standard: ContextVar[bool] = ContextVar("emssd_compile_standard_forms", default=False)


@contextmanager
def standard_forms() -> Iterator[None]:
    """Choose by no clock: the first form of everything, also where another was found to be faster before."""
    token = _is_standard.set(True)
    try:
        yield
    finally:
        _is_standard.reset(token)


class Selection:
    """Remembers the name of the fastest form of each class of calls."""

    def __init__(self, measure: Callable[[Call], float], may_measure: Callable[[], bool]) -> None:
        """`measure` gives the time of a call in any unit, `may_measure` says whether it can be taken now."""
        self._measure = measure
        self._may_measure = may_measure
        self._chosen: dict[Hashable, str] = {}

    @property
    def chosen(self) -> dict[Hashable, str]:
        """The name of the form in use, by class of calls."""
        return dict(self._chosen)

    def run(self, key: Hashable, forms: Mapping[str, Call]) -> Tensor:
        """The result of the form chosen for the calls of class `key`; the first form is the standard.

        A form that fails, or whose result differs from the standard's by more than rounding, is not chosen.
        """
        standard = next(iter(forms))
        if len(forms) == 1 or _is_standard.get():
            return forms[standard]()
        if key not in self._chosen:
            if not self._may_measure():
                return forms[standard]()
            self._chosen[key] = self._fastest(key, standard, forms)
        return forms[self._chosen[key]]()

    def _fastest(self, key: Hashable, standard: str, forms: Mapping[str, Call]) -> str:
        expected = forms[standard]()
        times = {standard: self._measure(forms[standard])}
        for name, call in forms.items():
            if name == standard:
                continue
            try:
                if agrees(call(), expected):
                    times[name] = self._measure(call)
                else:
                    _logger.warning("%s is not used for %s: its result is not that of %s", name, key, standard)
            except RuntimeError as error:
                _logger.warning("%s is not used for %s: %s", name, key, error)
        _logger.info("times for %s: %s", key, times)
        return min(times, key=lambda name: times[name])


def agrees(result: Tensor, expected: Tensor) -> bool:
    """Whether two results in half precision are equal up to the rounding of their inputs."""
    tolerance = 4 * torch.finfo(expected.dtype).eps
    expected = expected.float()
    return torch.allclose(result.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().mean()))


def cuda_milliseconds(call: Call) -> float:
    """Median time on the device of a call that has run before."""
    times: list[float] = []
    for _ in range(_RUNS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)
