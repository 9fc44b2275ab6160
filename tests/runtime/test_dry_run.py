"""How steps are measured before decoding: in turns, the first time left out, and not for long where they are long."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emssd_compile.runtime import dry_run
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.runtime.dry_run import DryRun


class FakeLauncher:
    """A device whose clock goes on by what steps are said to take, one number of seconds for each launch of a size."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.now = 0.0
        self.tensors = {"history": torch.zeros(4, 16), "active": torch.ones(4)}
        self.launched: list[int] = []
        self._seconds = seconds

    def launch(self, sizes: StepSizes) -> Any:
        tokens = sizes.token_range
        self.now += self._seconds[tokens][self.launched.count(tokens)]
        self.launched.append(tokens)
        return SimpleNamespace(read=lambda: None)

    def upload(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def assign(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = value


def measure(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]]) -> tuple[dict[int, float], list[int]]:
    launcher = FakeLauncher(seconds)
    memory = SimpleNamespace(rehearsal=lambda: SimpleNamespace(tokens=16, rows=4, tensors={}))
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: launcher.now))
    found = DryRun(launcher, memory, 0, None).idle_seconds([*seconds])  # type: ignore[arg-type]
    assert not launcher.tensors["active"].any()
    return found, launcher.launched


def test_the_least_time_of_all_but_the_first_counts(monkeypatch):
    seconds = {1: [0.001, 0.004, 0.003, 0.005, 0.004], 4: [0.001, 0.009, 0.009, 0.008, 0.009]}
    found, launched = measure(monkeypatch, seconds)
    assert found == pytest.approx({1: 0.003, 4: 0.008})
    assert launched == [1, 4] * 5


def test_long_steps_are_measured_twice(monkeypatch):
    found, launched = measure(monkeypatch, {1: [0.5, 0.2, 0.3], 4: [2.0, 1.0, 0.9]})
    assert found == pytest.approx({1: 0.2, 4: 0.9})
    assert launched == [1, 4] * 3
