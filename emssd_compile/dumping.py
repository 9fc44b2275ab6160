"""`emssd_compile.dump(dir)`: every stage of the graph as readable code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from emssd_compile.passes.manager import Observer, PassRecord

_ACTIVE: list[Observer] = []


def active_observers() -> tuple[Observer, ...]:
    """Observers of the dumps that are open."""
    return tuple(_ACTIVE)


@contextlib.contextmanager
def dump(directory: str | Path) -> Iterator[Path]:
    """While open, each compile writes `NN_<pass>.before.py`, `NN_<pass>.after.py` and a line to `summary.txt`.

    Args:
        directory: created if it is missing; files of the same names are overwritten.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.txt").write_text("")
    count = 0

    def observe(name: str, graph_module: fx.GraphModule, record: PassRecord | None) -> None:
        nonlocal count
        when = "before" if record is None else "after"
        (folder / f"{count:02d}_{name}.{when}.py").write_text(readable(graph_module))
        if record is not None:
            with (folder / "summary.txt").open("a") as summary:
                summary.write(
                    f"{count:02d} {record.level} {name}: {record.changed} changed, {record.nodes_before} -> "
                    f"{record.nodes_after} nodes, {record.seconds * 1e3:.1f} ms\n"
                )
            count += 1

    _ACTIVE.append(observe)
    try:
        yield folder
    finally:
        _ACTIVE.remove(observe)


def readable(graph_module: fx.GraphModule) -> str:
    """The graph as Python source with shapes in comments."""
    return graph_module.print_readable(print_output=False)
