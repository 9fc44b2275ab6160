"""Rows that end with tokens of their own.

A step knows one set of tokens that end a row. Where those of its rows differ, it is given what they have in common, and
the host ends a row at its others, as it does at a stop string. Some options of the logits look at the step's set: a row
that sets one needs it to be its own.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable

from emssd_compile.logits import PROCESSORS, LogitsProcessor
from emssd_compile.probes import PROBES, Probe
from emssd_compile.runtime.requests import Request


def shared_eos(requests: Iterable[Request]) -> frozenset[int]:
    """The tokens that end each of these requests."""
    several = [request.eos_token_ids for request in requests]
    return frozenset.intersection(*several) if several else frozenset()


def all_are_ours(processors: Iterable[LogitsProcessor]) -> bool:
    """Whether all of these come with the package: of others it is not known what they look at."""
    return {type(make()) for make in PROCESSORS}.issuperset(map(type, processors))


def looks_at_ends(options: Collection[str]) -> bool:
    """Whether what honours these options of rows may look at the tokens that end a row; of parts not ours it may."""
    return not _indifferent().issuperset(options)


@functools.cache
def _indifferent() -> frozenset[str]:
    processors = [processor for make in PROCESSORS if not (processor := make()).looks_at_ends]
    parts: list[LogitsProcessor | Probe] = [*processors, *(make() for make in PROBES)]
    return frozenset({"do_sample"}).union(*(part.options() for part in parts))
