"""Where rows keep keys and values, seen from the host: slabs here, and blocks of a pool in `pages`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from emssd_compile.runtime.launch import Launcher
from emssd_compile.runtime.requests import Request
from emssd_compile.step.signature import Signature


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run may use.

    Attributes:
        rows: so many of the first rows may decode.
        tokens: that each of them may hold.
        tensors: inputs of the step by name, as they are to be in it.
    """

    rows: int
    tokens: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Beginning:
    """How a request can start.

    Attributes:
        request: which.
        num_read: tokens of its prompt, less than all, whose keys and values are there.
        source: a row whose cache holds all of its prompt; None without.
        blocks: those that it has in common with others, of a kind of memory that has blocks.
    """

    request: Request
    num_read: int
    source: int | None = None
    blocks: tuple[int, ...] = ()


class KVMemory(Protocol):
    """What the engine asks of a kind of memory. It tells which rows start, what they may hold, and which have ended."""

    @property
    def capacity(self) -> int:
        """Tokens that one row can hold, if no other is busy."""
        ...

    def check(self, request: Request) -> None:
        """Raises CapacityError if the request could never start, however long it waits."""

    def is_being_read(self, request: Request) -> bool:
        """Whether a busy row reads what the request would share, so that it had better wait for that."""
        ...

    def plan(self, request: Request, sources: Sequence[int]) -> Beginning | None:
        """How the request starts now, if there is memory for it to go on to its end; else None.

        Args:
            request: which.
            sources: the rows that have read all of its prompt.
        """
        ...

    def start(self, launcher: Launcher, row: int, beginning: Beginning) -> None:
        """A request starts in a free row, as was planned since the last one started."""

    def note_read(self, row: int, num_read: int) -> None:
        """Keys and values of so many of a row's tokens are written for good."""

    def prepare(self, launcher: Launcher, tokens: Mapping[int, int]) -> None:
        """A step is launched next; `tokens` is how many each busy row may hold behind it, at most."""

    def release(self, row: int) -> None:
        """A row has ended, or could not start."""

    def end_run(self) -> None:
        """All rows have ended, and with them the call that the requests were of."""

    def forget(self) -> None:
        """The weights are others: nothing that was read before may be shared."""

    def rehearsal(self) -> Rehearsal:
        """What a dry run may use, while no row is busy."""
        ...

    def take_counts(self) -> dict[str, int]:
        """Counts for `Stats` since the last call."""
        ...


class Slabs:
    """A slab of C tokens for each row: nothing to keep account of.

    Args:
        signature: of the step.
    """

    def __init__(self, signature: Signature) -> None:
        self._signature = signature

    @property
    def capacity(self) -> int:
        """C."""
        return self._signature.sizes.capacity

    def check(self, request: Request) -> None:
        """Whatever fits a row fits."""

    def is_being_read(self, request: Request) -> bool:
        """No: rows share nothing but copies of a whole prompt."""
        return False

    def plan(self, request: Request, sources: Sequence[int]) -> Beginning:
        """At once."""
        if not sources:
            return Beginning(request, request.num_read)
        return Beginning(request, len(request.prompt) - 1, sources[0])

    def start(self, launcher: Launcher, row: int, beginning: Beginning) -> None:
        """Copy what the source has read."""
        if beginning.source is not None:
            launcher.copy_row(self._signature.with_role("cache"), beginning.source, row, beginning.num_read)

    def note_read(self, row: int, num_read: int) -> None:
        """Nothing."""

    def prepare(self, launcher: Launcher, tokens: Mapping[int, int]) -> None:
        """Nothing."""

    def release(self, row: int) -> None:
        """Nothing."""

    def end_run(self) -> None:
        """Nothing."""

    def forget(self) -> None:
        """Nothing."""

    def rehearsal(self) -> Rehearsal:
        """All rows, to the full."""
        return Rehearsal(self._signature.sizes.rows, self._signature.sizes.capacity)

    def take_counts(self) -> dict[str, int]:
        """None."""
        return {}
