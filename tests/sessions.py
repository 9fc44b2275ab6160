"""What tests of sessions share: a toy, what `generate` gives alone, a thread that stands still."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import emssd_compile
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.session import Session
from emssd_compile.stream import Stream
from tests.export.subjects import Small, drafter, prompt

ROWS, NEW, LENGTH = 2, 12, 64
WAIT = 60  # seconds after which a test that hangs has failed
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 0}


def optimized(**options: Any) -> OptimizedModel:
    """Two rows of 64 tokens, and drafts that are right now and then."""
    given = {"max_batch": ROWS, "max_length": LENGTH, "backend": "eager", "layout": "packed", **options}
    return emssd_compile.optimize(Small(), drafter("lookup"), **given)


@functools.cache
def fast() -> OptimizedModel:
    """One for many tests."""
    return optimized()


@functools.cache
def twin() -> OptimizedModel:
    """The same model, to ask while a session of the first is open."""
    return optimized()


_alone: dict[str, list[int]] = {}


def alone(ids: list[int], **options: Any) -> list[int]:
    """What `generate` gives for the prompt alone."""
    options = {"max_new_tokens": NEW, **options}
    key = repr((ids, sorted(options.items())))
    if key not in _alone:
        (_alone[key],) = twin().generate([ids], **options)
    return _alone[key]


@contextmanager
def held(session: Session, **options: Any) -> Iterator[Stream]:
    """A request whose stopping criterion lets the session's thread stand still after its first token."""
    reached, go = threading.Event(), threading.Event()

    def hold(ids: object, scores: object) -> bool:
        reached.set()
        assert go.wait(WAIT)
        return False

    try:
        stream = session.submit(prompt(5), **{"max_new_tokens": NEW, "stopping_criteria": [hold], **options})
        assert reached.wait(WAIT)
        yield stream
    finally:
        go.set()
