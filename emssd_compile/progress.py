"""What is shown while something takes long, on standard error: standard output is for results.

Bars and spinners in a terminal, and in a notebook that has ipywidgets, which rich draws with. Elsewhere plain lines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 10.0
"""Seconds between two plain lines."""


@contextlib.contextmanager
def progress_bar(shown: bool, total: int, what: str = "tokens") -> Iterator[Callable[[int], None]]:
    """A bar over at most `total` of something; yields what to call with each number of new ones."""
    if not shown:
        yield lambda count: None
        return
    if not _can_redraw():
        lines = _Lines(total, what)
        yield lines.advance
        lines.write()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def working(what: str, *, shown: bool) -> Iterator[None]:
    """A spinner with the time gone by, for work whose end is not known."""
    if not shown:
        yield
        return
    if not _can_redraw():
        _write(f"{what} ...")
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        progress.add_task(what, total=None)
        yield


class _Lines:
    """How far it is, in a line now and then."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._done = total, what, 0
        self._began = self._written = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() >= self._written + EVERY:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        _write(f"{self._what}: {self._done}/{self._total} in {self._written - self._began:.0f} s")


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _can_redraw() -> bool:
    """Whether what was shown can be shown anew."""
    from rich.console import Console

    console = Console(stderr=True)
    return importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
