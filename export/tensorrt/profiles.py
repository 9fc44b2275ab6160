"""Which sizes an engine is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from emssd_compile.errors import OptionError
from emssd_compile.passes.graph import inputs, shape

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Least, usual and largest shape of an input."""
Profile = dict[str, Range]
"""The range of each input whose shape may differ from call to call, by name."""


def make_profiles(
    graph: fx.Graph, most: Mapping[str, int], buckets: Sequence[Mapping[str, int]], *, per_bucket: bool
) -> list[Profile]:
    """Optimisation profiles: of the buckets, and of all other steps up to the largest.

    Args:
        graph: the step; sizes that may differ are symbolic in its inputs.
        most: the largest sizes of a step: the length of an input by its name. One input of each symbol will do.
        buckets: sizes that are run often.
        per_bucket: a profile for each bucket, rather than one that spans them all.

    Raises:
        OptionError: a size is not given, is no positive integer, or belongs to no input.
    """
    spans = [(bucket, bucket) for bucket in buckets] if per_bucket else _span(buckets)
    least = dict.fromkeys(most, 1)
    return [_profile(graph, low, high) for low, high in [*spans, (least, most)]]


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


def _span(buckets: Sequence[Mapping[str, int]]) -> list[tuple[Mapping[str, int], Mapping[str, int]]]:
    if not buckets:
        return []
    low = {name: min(bucket[name] for bucket in buckets) for name in buckets[0]}
    return [(low, {name: max(bucket[name] for bucket in buckets) for name in low})]


def _profile(graph: fx.Graph, low: Mapping[str, int], high: Mapping[str, int]) -> Profile:
    """The profile from `low` to `high`; steps are expected to be large rather than small."""
    sizes = [_symbols(graph, given) for given in (low, high, high)]
    return {
        str(node.target): tuple(tuple(_size(s, values, node) for s in shape(node) or ()) for values in sizes)  # type: ignore[misc]
        for node in inputs(graph)
        if any(isinstance(size, torch.SymInt) for size in shape(node) or ())
    }


def _symbols(graph: fx.Graph, given: Mapping[str, int]) -> dict[str, int]:
    """The value of each symbol, from the lengths of inputs."""
    lengths = {str(node.target): (shape(node) or (0,))[0] for node in inputs(graph)}
    for name, size in given.items():
        if not isinstance(lengths.get(name), torch.SymInt):
            raise OptionError(f"{name!r} is no input whose length may differ")
        if not isinstance(size, int) or size < 1:
            raise OptionError(f"the length {size!r} of {name} must be a positive integer")
    return {str(lengths[name]): size for name, size in given.items()}


def _size(size: int | torch.SymInt, values: Mapping[str, int], node: fx.Node) -> int:
    if isinstance(size, int):
        return size
    if str(size) not in values:
        raise OptionError(f"no length is given for the input {node.target}")
    return values[str(size)]
