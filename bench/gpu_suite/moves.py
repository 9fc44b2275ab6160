"""Whether accepted tokens of draft trees are moved right on a device, and at what share of its bandwidth.

    python -m bench.gpu_suite.moves --device cuda --json moves.json

Bytes are those of every accepted token but the root, read once and written once. The bandwidth is measured. What little
there is to move fits into a cache, and a step moves little: what counts is the time of a call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from bench.command import argument_parser, describe, hardware, make_console, parse, save, versions
from bench.measure import call_seconds, memory_bandwidth
from emssd_compile import ops
from emssd_compile.ops import _move_kv

Move = Callable[..., None]
_FORMS: dict[str, Move] = {"op": ops.move_kv, "reference": _move_kv.reference}
_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """The moves of one layer in one step: each row accepts `depth` nodes of its tree, the root and every second one.

    Attributes:
        rows: B.
        depth: accepted nodes of each row.
        context: committed tokens of each row.
        kv_heads: Hkv.
        head_size: D, of keys and of values.
    """

    rows: int
    depth: int
    context: int
    kv_heads: int
    head_size: int

    def num_bytes(self, itemsize: int) -> int:
        """Bytes that have to be moved, in and out."""
        return 2 * self.rows * (self.depth - 1) * 2 * self.kv_heads * self.head_size * itemsize


_SMOKE = (Case(3, 4, 10, 2, 16),)
_FULL = tuple(Case(rows, depth, 1000, 8, 128) for rows in (1, 8, 32) for depth in (4, 16))


@dataclass(frozen=True)
class Verdict:
    """One form on one case.

    Attributes:
        case: the case.
        dtype: of the caches.
        form: `"op"`, as a step calls it, or `"reference"`.
        identical: the caches have the right bits, everywhere.
        seconds: of one call.
        bytes_per_second: `Case.num_bytes` over `seconds`.
        bandwidth_share: of the measured one.
    """

    case: Case
    dtype: str
    form: str
    identical: bool
    seconds: float
    bytes_per_second: float
    bandwidth_share: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, time, print, save after each case; returns 1 if a bit is wrong."""
    options = parse_arguments(arguments)
    ops.load_kernels(options.device.type)
    bandwidth = memory_bandwidth(options.device, options.repeats)
    verdicts: list[Verdict] = []
    for dtype in _DTYPES:
        for case in _SMOKE if options.smoke else _FULL:
            for name, form in _FORMS.items():
                verdicts.append(examine(case, options.device, dtype, bandwidth, name, form))
            if options.json:
                rows = [{**asdict(verdict), **asdict(verdict.case)} for verdict in verdicts]
                shown = {"title": "moves", "bandwidth_bytes_per_second": bandwidth, "rows": rows}
                save(options.json, "bench.gpu_suite.moves", [shown], form=ops.kernel_status(options.device.type))
    make_console().print(table(verdicts, bandwidth))
    return int(not all(verdict.identical for verdict in verdicts))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    return parse(parser, arguments)


def examine(case: Case, device: torch.device, dtype: torch.dtype, bandwidth: float, name: str, form: Move) -> Verdict:
    """One form on one case; `bandwidth` is in bytes a second."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.rows, case.context + 2 * case.depth, case.kv_heads, case.head_size)
    k_cache, v_cache = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    starts = torch.full((case.rows,), case.context)
    path = 2 * torch.arange(case.depth).expand(case.rows, -1)
    counts = torch.full((case.rows,), case.depth)
    moved = [tensor.to(device, copy=True) for tensor in (k_cache, v_cache, starts, path, counts)]
    form(*moved)
    identical = all(
        torch.equal(cache.cpu(), _expected(before, case))
        for cache, before in zip(moved, (k_cache, v_cache), strict=False)
    )
    seconds = call_seconds(partial(form, *moved), device)
    rate = case.num_bytes(dtype.itemsize) / seconds
    return Verdict(case, str(dtype), name, identical, seconds, rate, rate / bandwidth)


def _expected(cache: Tensor, case: Case) -> Tensor:
    """The cache after the moves."""
    expected = cache.clone()
    expected[:, case.context : case.context + case.depth] = cache[:, case.context :: 2]
    return expected


def table(verdicts: Sequence[Verdict], bandwidth: float) -> Table:
    """For `rich`."""
    shown = Table(
        title=f"moves of accepted tokens; measured bandwidth {bandwidth / 1e9:.1f} GB/s",
        caption=f"{describe(hardware())}\n{describe(versions())}",
    )
    for heading in ("Hkv/D", "rows", "accepted", "dtype", "form", "µs", "GB/s", "of bandwidth", ""):
        shown.add_column(heading)
    for verdict in verdicts:
        shown.add_row(
            f"{verdict.case.kv_heads}/{verdict.case.head_size}",
            str(verdict.case.rows),
            str(verdict.case.depth),
            verdict.dtype,
            verdict.form,
            f"{verdict.seconds * 1e6:.1f}",
            f"{verdict.bytes_per_second / 1e9:.1f}",
            f"{verdict.bandwidth_share:.0%}",
            "" if verdict.identical else "WRONG",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
