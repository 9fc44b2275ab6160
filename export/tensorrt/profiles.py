"""Which sizes an engine is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from emssd_compile.passes.graph import inputs, shape
from emssd_compile.runtime.buckets import StepSizes

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Least, usual and largest shape of an input."""
Profile = dict[str, Range]
"""The range of each input whose shape may differ from call to call, by name."""


def make_profiles(graph: fx.Graph, sizes: Sequence[StepSizes], *, per_bucket: bool) -> list[Profile]:
    """Optimisation profiles: of the sizes that are captured, and last of all steps up to the largest.

    Args:
        graph: the step; sizes that may differ are symbolic in its inputs. Those that no input of a name in `StepSizes`
            has may be as large as the largest T.
        sizes: of the steps that are captured, and last of the largest step.
        per_bucket: a profile for each captured size, rather than one that spans them all.
    """
    *buckets, most = (size._asdict() for size in sizes)
    spans = [(bucket, bucket) for bucket in buckets] if per_bucket else _span(buckets)
    return [_profile(graph, low, high, sizes[-1].token_range) for low, high in [*spans, (dict.fromkeys(most, 1), most)]]


def choose(profiles: Sequence[Profile], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The first profile that covers `shapes`; None if none does."""
    for index, profile in enumerate(profiles):
        if all(
            low <= size <= high
            for name, (least, _, most) in profile.items()
            for low, size, high in zip(least, shapes[name], most, strict=True)
        ):
            return index
    return None


def _span(buckets: Sequence[dict[str, int]]) -> list[tuple[Mapping[str, int], Mapping[str, int]]]:
    if not buckets:
        return []
    low = {name: min(bucket[name] for bucket in buckets) for name in buckets[0]}
    return [(low, {name: max(bucket[name] for bucket in buckets) for name in low})]


def _profile(graph: fx.Graph, low: Mapping[str, int], high: Mapping[str, int], longest: int) -> Profile:
    """The profile from `low` to `high`; steps are expected to be large rather than small."""
    values = [_values(graph, low, 1), _values(graph, high, longest), _values(graph, high, longest)]
    return {
        str(node.target): tuple(tuple(given.get(str(size), size) for size in shape(node) or ()) for given in values)  # type: ignore[misc]
        for node in inputs(graph)
        if any(isinstance(size, torch.SymInt) for size in shape(node) or ())
    }


def _values(graph: fx.Graph, lengths: Mapping[str, int], other: int) -> dict[str, int]:
    """The value of each symbol: the length of the input that has it, or `other`."""
    values: dict[str, int] = {}
    for node in inputs(graph):
        for size in shape(node) or ():
            if isinstance(size, torch.SymInt):
                values.setdefault(str(size), other)
                if str(node.target) in lengths:
                    values[str(size)] = lengths[str(node.target)]
    return values
