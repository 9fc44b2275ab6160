"""The contract of a probe: what the host is told of each token that a step emits."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emssd_compile.errors import ProbeError
from emssd_compile.step.fields import holds_tensors
from emssd_compile.step.parts import Part, PartSizes

READING = "reading_"
"""How the names of those results of a step begin that are readings."""

NAMES_TAKEN = frozenset(("self", "sequences", "to_tuple", *dir(Mapping), *keyword.kwlist))
"""What is no name for a reading: the output of `generate` has something else by it, or Python has."""


@dataclass(frozen=True)
class ReadingSpec:
    """What a probe tells of one token.

    Attributes:
        shape: of the value for one token.
        dtype: of it.
        asked_by: the name of the probe's option by which a request asks for it; empty: each is told.
        is_cut: whether the value of that option says how many of the last size's entries the request is shown.
        of_steps: whether the host arranges the values as transformers does, one tensor `[B, *shape]` for each place in
            the output, zeros behind the end of a row; else one tensor `[n, *shape]` for each row of `n` new tokens.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    asked_by: str = ""
    is_cut: bool = False
    of_steps: bool = False


@holds_tensors
@dataclass
class ProbeContext:
    """What a step has done.

    Attributes:
        tokens: int64 `[B, D + 1]`, tokens emitted by each row; the first `counts[b]` mean something.
        counts: int64 `[B]`.
        places: int64 `[B, D + 1]`, which of the logits each of them was chosen from; rubbish where there is none.
        raw_logits: float `[R, V]`, as the model gave them.
        logits: float `[R, V]`, as they were when tokens were chosen by them.
        options: the options that the probe declares, `[B]` each, or `[B, *shape]`, by name.
        state: the probe's own tensors, as declared by `Probe.tensors`.
    """

    tokens: Tensor
    counts: Tensor
    places: Tensor
    raw_logits: Tensor
    logits: Tensor
    options: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


@holds_tensors
@dataclass
class Probed:
    """What a probe answers.

    Attributes:
        values: `[B, D + 1, *shape]` each, by the names in `Probe.readings`: a value for each token of
            `ProbeContext.tokens`.
        state: new values of the tensors in `Probe.tensors`, but for those written in place.
    """

    values: dict[str, Tensor] = field(metadata={"declared": "readings"})
    state: dict[str, Tensor] = field(default_factory=dict)


class Probe(Part):
    """Tells the host of what a step does, and changes nothing of it.

    It is compiled into a step only where a request sets one of its options to something other than its default, or
    where it declares none. `generate(return_dict_in_generate=True)` returns what it tells under the names of its
    readings.
    """

    def readings(self, sizes: PartSizes) -> dict[str, ReadingSpec]:
        """What it tells, by names that no other probe uses."""
        raise NotImplementedError

    def forward(self, context: ProbeContext) -> Probed:
        """Look at all rows at once."""
        raise NotImplementedError


def check_readings(probe: Probe, declared: object) -> dict[str, ReadingSpec]:
    """What `probe.readings` declared, if it makes sense. Raises ProbeError saying which reading does not."""
    name = type(probe).__name__
    if not isinstance(declared, dict) or not declared:
        raise ProbeError(f"{name}.readings returned {declared!r}; return a dict of ReadingSpecs by name, at least one")
    for reading, spec in declared.items():
        if not (isinstance(reading, str) and reading.isascii() and reading.isidentifier()) or reading in NAMES_TAKEN:
            raise ProbeError(f"{name}.readings declares {reading!r}; name it as an attribute of the output is named")
        if not isinstance(spec, ReadingSpec):
            raise ProbeError(f"{name}.readings declares {reading!r}: a {type(spec).__name__} is no ReadingSpec")
        if not isinstance(spec.shape, tuple) or not all(type(size) is int and size >= 0 for size in spec.shape):
            raise ProbeError(f"{name}.readings declares {reading!r}: shape {spec.shape!r} is no tuple of integers >= 0")
        if not isinstance(spec.dtype, torch.dtype):
            raise ProbeError(f"{name}.readings declares {reading!r}: dtype {spec.dtype!r} is no torch.dtype")
        if spec.asked_by and spec.asked_by not in probe.options():
            raise ProbeError(f"{name}.readings declares {reading!r}: asked_by={spec.asked_by!r} is no option of it")
        if spec.is_cut and not (spec.shape and spec.asked_by):
            raise ProbeError(f"{name}.readings declares {reading!r}: is_cut needs asked_by, and a size to be cut")
    return dict(declared)


def merge_readings(probes: Iterable[Mapping[str, ReadingSpec]]) -> dict[str, ReadingSpec]:
    """The readings of all probes. Raises ProbeError if two of them have one of the same name."""
    found: dict[str, ReadingSpec] = {}
    for readings in probes:
        for name, spec in readings.items():
            if name in found:
                raise ProbeError(f"two probes tell of {name!r}; give one of them another name")
            found[name] = spec
    return found
