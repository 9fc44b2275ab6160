"""Rings, seen from the host: what a row still has of the prompt that it read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emssd_compile.runtime.kv_memory import Beginning, KVMemory, Rehearsal
from emssd_compile.runtime.launch import Launcher
from emssd_compile.runtime.requests import Request
from emssd_compile.step.rings import Rings


class Windows:
    """Rings beside slabs or a pool: a row of the prompt is a source for others until it has written over what they see.

    Args:
        others: where the other keys and values are.
        rings: which caches are rings.
    """

    def __init__(self, others: KVMemory, rings: Rings) -> None:
        self._others, self._rings = others, rings
        self._written: dict[int, int] = {}  # by row, slots that a step may have written to, at most

    @property
    def capacity(self) -> int:
        """That of the others."""
        return self._others.capacity

    def check(self, request: Request) -> None:
        """What fits the others fits."""
        self._others.check(request)

    def is_being_read(self, request: Request) -> bool:
        """As the others say."""
        return self._others.is_being_read(request)

    def plan(self, request: Request, sources: Sequence[int]) -> Beginning | None:
        """As the others say; a row that has gone too far is no source, and without one the prompt is read anew."""
        num_read = len(request.prompt) - 1
        return self._others.plan(request, [b for b in sources if self._rings.hold(num_read, self._written.get(b, 0))])

    def start(self, launcher: Launcher, row: int, beginning: Beginning) -> None:
        """Copy whole rings: which of their slots are seen depends on the step."""
        self._others.start(launcher, row, beginning)
        if beginning.source is None:
            return
        for name in self._rings.reaches:
            count = self._rings.row_blocks(name)
            for place in range(count):
                source, own = beginning.source * count + place, row * count + place
                launcher.copy_row([name], source, own, self._rings.block_size)

    def note_read(self, row: int, num_read: int) -> None:
        """Tell the others."""
        self._others.note_read(row, num_read)

    def prepare(self, launcher: Launcher, tokens: Mapping[int, int]) -> None:
        """Remember how far rows may come."""
        self._written |= tokens
        self._others.prepare(launcher, tokens)

    def release(self, row: int) -> None:
        """Nothing is written of the next request."""
        self._written.pop(row, None)
        self._others.release(row)

    def end_run(self) -> None:
        """Tell the others."""
        self._others.end_run()

    def forget(self) -> None:
        """Tell the others."""
        self._others.forget()

    def rehearsal(self) -> Rehearsal:
        """That of the others."""
        return self._others.rehearsal()

    def take_counts(self) -> dict[str, int]:
        """Those of the others."""
        return self._others.take_counts()
