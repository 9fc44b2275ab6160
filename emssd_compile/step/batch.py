"""The sizes of a batch that never change once a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShape:
    """Sizes that are fixed when a model is compiled.

    Attributes:
        rows: B, rows of the KV cache.
        capacity: C, tokens a row can hold.
    """

    rows: int
    capacity: int
