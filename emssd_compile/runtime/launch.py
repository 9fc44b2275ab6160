"""Who launches a step: it owns the tensors that travel from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from emssd_compile.lowering import StepFunction
from emssd_compile.runtime.buckets import StepSizes, smallest_cover
from emssd_compile.runtime.cuda import CudaDevice
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.signature import DRAFT_ROWS, Signature
from emssd_compile.step.state import CONSTANT_FIELDS


@dataclass(frozen=True)
class Report:
    """What a step tells the host, perhaps still on its way.

    Attributes:
        values: int64 `[B, 6 + D + 1]` on the CPU, `REPORT_FIELDS` and the emitted tokens.
        wait: returns when `values` and readings are there.
        readings: what probes tell, `[B, D + 1, ...]` on the CPU, by the names of results.
    """

    values: Tensor
    wait: Callable[[], object]
    readings: Mapping[str, Tensor] = field(default_factory=dict)

    def read(self) -> list[list[int]]:
        """Wait for this step's report, and for nothing that was launched after it."""
        self.wait()
        values: list[list[int]] = self.values.tolist()
        return values


@dataclass(frozen=True, eq=False)
class Variant:
    """One compiled form of a step. Those of a model differ in what is in them, and share tensors and caches.

    Attributes:
        step: the lowered step.
        signature: its bindings.
        is_capturable: whether it can be one launch: all of it runs on the device.
        plain: the same step without its drafter, or without what is costly of it, to be run where that is faster.
        drafts: whether it verifies drafts and makes new ones.
        drafter_remembers: whether the drafter then lacks what it misses, until rows have ended.
    """

    step: StepFunction
    signature: Signature
    is_capturable: bool = True
    plain: Variant | None = None
    drafts: bool = True
    drafter_remembers: bool = False

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """What the step takes, in order."""
        return tuple(binding.name for binding in self.signature.inputs)

    @cached_property
    def of_first_rows(self) -> frozenset[str]:
        """Inputs of which it takes as many rows as it drafts for."""
        return frozenset(
            name for name, cache in self.signature.with_role("cache").items() if cache.shape[0] == DRAFT_ROWS
        )


class Launcher(ABC):
    """Runs steps on the tensors it owns. All changes to them go through it, in the order of the calls.

    Args:
        variant: the step.
        tensors: its inputs by name, but for those named in `StepSizes`: state, the parts' state, options, caches.

    Attributes:
        variant: the form of the step that is run.
        tensors: the same, as the last launched step leaves them.
        buckets: sizes that are run as one launch, once they have been launched before.
        rows_in_use: no row from this one on is decoded.
    """

    buckets: tuple[StepSizes, ...] = ()

    def __init__(self, variant: Variant, tensors: dict[str, Tensor]) -> None:
        self.variant = variant
        self.tensors = dict(tensors)
        self.rows_in_use = len(tensors["history"])
        self._ranges: dict[tuple[str, int], Tensor] = {}

    @abstractmethod
    def launch(self, sizes: StepSizes) -> Report:
        """Run a step of at least these sizes."""

    @abstractmethod
    def assign(self, name: str, value: Tensor) -> None:
        """Give a tensor a new value, of the same shape and dtype and on the same device."""

    @abstractmethod
    def upload(self, value: Tensor) -> Tensor:
        """`value`, made on the CPU, where the tensors are."""

    def copy_row(self, names: Iterable[str], source: int, row: int, count: int) -> None:
        """Write the first `count` slots of a row, or of a block, of each KV cache to another one, where they lie."""
        for name in names:
            cache = self.tensors[name]  # [B, C, ...], or [blocks, P, ...]
            cache[row, :count].copy_(cache[source, :count])

    def use(self, variant: Variant, tensors: dict[str, Tensor]) -> None:
        """Run another form of the step from now on; `tensors` are those that only it has."""
        self.variant = variant
        self.tensors.update(tensors)

    def forget_captures(self) -> None:  # noqa: B027  (a launcher need not record anything)
        """Weights lie elsewhere than before: forget what was recorded with their old addresses."""

    def _run(self, sizes: StepSizes) -> dict[str, Tensor]:
        lengths = {**sizes._asdict(), DRAFT_ROWS: self.rows_in_use}
        given: list[Tensor] = []
        for name in self.variant.input_names:
            value = self._arange(name, lengths[name]) if name in lengths else self.tensors[name]
            given.append(value[: self.rows_in_use] if name in self.variant.of_first_rows else value)
        with torch.no_grad():
            return self.variant.step(*given)

    def _arange(self, name: str, length: int) -> Tensor:
        """The input `name` of that length. No two inputs share a tensor: a compiled step would take that for a rule.

        Kept for good: a captured step reads it where it lies.
        """
        if (name, length) not in self._ranges:
            self._ranges[name, length] = torch.arange(length, device=self.tensors["history"].device)
        return self._ranges[name, length]


class DirectLauncher(Launcher):
    """Calls the step, and takes the tensors it returns in place of the old ones.

    For the CPU, where a call that returns has done its work.
    """

    def launch(self, sizes: StepSizes) -> Report:
        """Run the step; its report is there when this returns."""
        results = self._run(sizes)
        report = results.pop("report")
        readings = {name: results.pop(name) for name in self.variant.signature.readings}
        self.tensors.update(results)
        return Report(report, lambda: None, readings)

    def assign(self, name: str, value: Tensor) -> None:
        """Put `value` in the place of the tensor."""
        self.tensors[name] = value

    def upload(self, value: Tensor) -> Tensor:
        """`value` itself: the tensors are on the CPU, too."""
        return value


class Device(Protocol):
    """What `GraphLauncher` needs of a device; `CudaDevice` says what each means."""

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Run `work` once, then record it without running it; returns what replays the record."""
        ...

    def upload(self, value: Tensor) -> Tensor:
        """`value` on the device."""
        ...

    def download(self, value: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """A copy of `value` in host memory, and what waits until it is there."""
        ...


class GraphLauncher(Launcher):
    """Runs whole decode steps as one launch each: CUDA graphs, captured once per bucket of sizes.

    A graph works on the addresses it was captured with. So the tensors stay where they are: a step ends by copying
    what it returns into them, and the host changes them in place. Drafting, verification, acceptance, the update of
    the state and these copies are all in the graph; a replay needs no arguments. KV caches are not copied, since the
    step writes them in place, and weights are read where they lie: if they move, `forget_captures` must be called.

    The first step of a bucket runs directly, as the warm-up that a capture needs; then it is captured. Steps that no
    bucket covers (chunks of prompts) always run directly: they are few, and long enough to hide their launches.

    Nothing waits for the device but `Report.read` and a capture.

    Args:
        variant, tensors: as for `Launcher`; `tensors` are written in place.
        device: how to capture and to copy.
        buckets: sizes to capture, ascending; none runs every step directly.
    """

    def __init__(
        self, variant: Variant, tensors: dict[str, Tensor], device: Device, buckets: tuple[StepSizes, ...]
    ) -> None:
        super().__init__(variant, tensors)
        self.buckets = buckets
        self._device = device
        self._replays: dict[tuple[Variant, StepSizes], Callable[[], object]] = {}
        width = len(REPORT_FIELDS) + len(tensors["histogram"])
        self._report = tensors["history"].new_zeros((len(tensors["history"]), width))
        self._readings: dict[str, Tensor] = {}  # what steps have told last, where graphs leave it

    def forget_captures(self) -> None:
        """Each bucket is captured anew when it is launched next."""
        self._replays.clear()

    def launch(self, sizes: StepSizes) -> Report:
        """Replay the graph of the smallest bucket that covers `sizes`, or run the step where none does."""
        bucket = smallest_cover(self.buckets, sizes) if self.variant.is_capturable else None
        if bucket is None:
            self._advance(sizes)
        elif (replay := self._replays.get((self.variant, bucket))) is not None:
            replay()
        else:
            self._replays[self.variant, bucket] = self._device.capture(partial(self._advance, bucket))
        # The next step overwrites the report, maybe before it has reached the host: what travels is a copy.
        values, wait = self._device.download(self._report.clone())
        told = {name: self._device.download(self._readings[name].clone()) for name in self.variant.signature.readings}
        waits = [wait, *(until for _, until in told.values())]
        return Report(values, lambda: [until() for until in waits], {name: lines for name, (lines, _) in told.items()})

    def assign(self, name: str, value: Tensor) -> None:
        """Copy `value` into the tensor, which stays where graphs read it."""
        self.tensors[name].copy_(value)

    def upload(self, value: Tensor) -> Tensor:
        """A copy of `value` on the device, in the order of the stream."""
        return self._device.upload(value)

    def _advance(self, sizes: StepSizes) -> None:
        """Run a step and leave its results in the tensors."""
        results = self._run(sizes)
        self._report.copy_(results.pop("report"))
        for name in self.variant.signature.readings:
            told = results.pop(name)
            self._readings.setdefault(name, torch.empty_like(told)).copy_(told)
        changed = {
            name: value
            for name, value in results.items()
            if name not in CONSTANT_FIELDS and not value.is_set_to(self.tensors[name])
        }
        held = {tensor.untyped_storage().data_ptr() for tensor in self.tensors.values()}
        # A result may lie in one of the tensors (a drafter returned what it was given): read all, then write.
        values = {n: v.clone() if v.untyped_storage().data_ptr() in held else v for n, v in changed.items()}
        for name, value in values.items():
            self.tensors[name].copy_(value)


def make_launcher(variant: Variant, tensors: dict[str, Tensor], buckets: tuple[StepSizes, ...]) -> Launcher:
    """The launcher for the device that `tensors` lie on; `buckets` are captured where that is a CUDA device."""
    device = tensors["history"].device
    if device.type == "cuda":
        return GraphLauncher(variant, tensors, CudaDevice(device), buckets)
    return DirectLauncher(variant, tensors)
