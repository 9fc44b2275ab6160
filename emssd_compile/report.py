"""`explain()`: what the compiler did, for people."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from rich.console import Console

    from emssd_compile.passes.manager import PassRecord


@dataclass(frozen=True)
class Explanation:
    """What each pass did, and what the step holds. Printing it shows both as tables.

    Attributes:
        records: one per pass, in order.
        ops: how often each op stands in the step graph.
        num_graphs: step graphs: 1.
        memory: where keys and values are, and how much memory that takes.
    """

    records: tuple[PassRecord, ...]
    ops: dict[str, int]
    num_graphs: int = 1
    memory: str = ""

    @classmethod
    def of(cls, records: list[PassRecord], graph_module: fx.GraphModule, memory: str = "") -> Explanation:
        """Explain a compiled step; `memory` is what `runtime.memory.describe` says of it."""
        ops = Counter(str(n.target) for n in graph_module.graph.nodes if n.op == "call_function")
        return cls(tuple(records), dict(ops.most_common()), memory=memory)

    def to_dict(self) -> dict[str, Any]:
        """As what JSON knows."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Explanation:
        """Back from `to_dict`."""
        from emssd_compile.passes.manager import PassRecord, Refusal  # brings sympy

        records = tuple(
            PassRecord(**{**r, "notes": tuple(r["notes"]), "refusals": tuple(Refusal(**x) for x in r["refusals"])})
            for r in content["records"]
        )
        return cls(records, content["ops"], content["num_graphs"], content.get("memory", ""))

    @property
    def padding_ops(self) -> int:
        """Ops that pad a tensor, with a constant or a jagged one to a rectangle: 0 is the promise."""
        return sum(count for op, count in self.ops.items() if "pad" in op.lower())

    def record(self, name: str) -> PassRecord:
        """The record of a pass."""
        return next(r for r in self.records if r.name == name)

    def __str__(self) -> str:
        return self._recorded().export_text()

    def _repr_html_(self) -> str:
        """What a notebook shows of a cell's last value."""
        return self._recorded().export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _recorded(self) -> Console:
        from rich.console import Console

        # In a notebook rich would also show at once what is only recorded.
        console = Console(width=120, record=True, file=io.StringIO(), force_jupyter=False)
        self.print(console)
        return console

    def print(self, console: object | None = None) -> None:
        """Print the tables, to `console` (a `rich.console.Console`) or the terminal."""
        from rich.console import Console
        from rich.table import Table

        target = console if isinstance(console, Console) else Console()
        table = Table(title="passes")
        for column in ("level", "pass", "changed", "nodes", "ms", "notes and refusals"):
            table.add_column(column, justify="right" if column in ("changed", "ms") else "left")
        for r in self.records:
            remarks = [*r.notes, *(f"left %{x.node}: {x.reason}" for x in r.refusals)]
            nodes = f"{r.nodes_before} -> {r.nodes_after}"
            table.add_row(r.level, r.name, str(r.changed), nodes, f"{r.seconds * 1e3:.0f}", "\n".join(remarks))
        target.print(table)
        attention = sum(n for op, n in self.ops.items() if "ragged_attention" in op)
        target.print(
            f"one step graph of {sum(self.ops.values())} ops: {attention} ragged_attention, "
            f"{self.ops.get('emssd.append_kv.default', 0)} append_kv, {self.padding_ops} padding ops"
        )
        if self.memory:
            target.print(f"KV memory: {self.memory}", highlight=False)
        for op, count in list(self.ops.items())[:12]:
            target.print(f"  {count:4d}  {op}", highlight=False)
