"""Whether attention over draft trees is right on a device, and what it costs against attention over chains.

    python -m bench.gpu_suite.trees --device cuda --json trees.json

A step holds rows of trees and one row that reads a prompt, longer than the bits of a tree. The error is the largest
difference from the reference in float32, over its largest value; slots that no token has written are NaN.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench.command import argument_parser, describe, hardware, make_console, parse, save, versions
from bench.measure import call_seconds
from emssd_compile import ops
from emssd_compile.ops import _ragged_attention
from tests.ops.ragged import Batch, Heads, make_batch, with_trees

Attention = Callable[..., Tensor]
_SMOKE = ([(20, 9), (5, 20), (3, 40)], Heads(4, 2, 16, 16))
_FULL = ([(1000, 24)] * 7 + [(100, 600)], Heads(32, 8, 128, 128))
_DTYPES = (torch.bfloat16, torch.float32)
_OPTIONS: dict[str, dict[str, int]] = {"plain": {}, "window": {"window": 300}}


@dataclass(frozen=True)
class Verdict:
    """One case.

    Attributes:
        case: options of attention.
        dtype: of queries, keys and values.
        error: see above; `None` if the output is not finite.
        limit: the error that rounding may make.
        tree_seconds: of one call.
        chain_seconds: of one call for as many tokens in chains.
    """

    case: str
    dtype: str
    error: float | None
    limit: float
    tree_seconds: float
    chain_seconds: float

    @property
    def good(self) -> bool:
        """The error is rounding."""
        return self.error is not None and self.error <= self.limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, time, print, save after each case; returns 1 if one is wrong."""
    options = parse_arguments(arguments)
    ops.load_kernels(options.device.type)
    rows, heads = _SMOKE if options.smoke else _FULL
    verdicts: list[Verdict] = []
    for dtype in _DTYPES:
        for case in _OPTIONS:
            verdicts.append(examine(rows, heads, case, options.device, dtype))
            if options.json:
                shown = {"title": "tree attention", "rows": [asdict(verdict) for verdict in verdicts]}
                save(options.json, "bench.gpu_suite.trees", [shown], form=ops.kernel_status(options.device.type))
    make_console().print(table(verdicts))
    return int(not all(verdict.good for verdict in verdicts))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    return parse(parser, arguments)


def examine(
    rows: list[tuple[int, int]],
    heads: Heads,
    case: str,
    device: torch.device,
    dtype: torch.dtype,
    form: Attention = ops.ragged_attention,
) -> Verdict:
    """One form of attention on `rows` of committed and new tokens, the trees among them of one word of bits."""
    chains = make_batch(rows, heads, tail=1, dtype=dtype).with_options(**_OPTIONS[case])
    trees = _on(device, with_trees(chains, words=1))
    chains = _on(device, chains)
    expected = _expected(trees)
    found = form(*trees.tensors, **trees.options)
    error = float((found.float() - expected).abs().max() / expected.abs().max())
    seconds = [call_seconds(partial(form, *step.tensors, **step.options), device) for step in (trees, chains)]
    limit = 4 * (5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    return Verdict(case, str(dtype), error if math.isfinite(error) else None, limit, *seconds)


def _on(device: torch.device, batch: Batch) -> Batch:
    moved = {field.name: getattr(batch, field.name).to(device) for field in fields(batch) if field.name != "options"}
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.options.items()}
    return Batch(**moved, options=options)


def _expected(batch: Batch) -> Tensor:
    """The reference in float32, row by row, which bounds its memory; zeros for the tail."""
    out = torch.zeros(*batch.q.shape[:2], batch.v_cache.shape[3], device=batch.q.device)
    bounds = batch.offsets.tolist()
    options: dict[str, Any] = batch.options
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own, new = slice(row, row + 1), slice(begin, end)
        out[new] = _ragged_attention.reference(
            batch.q[new].float(),
            batch.k_cache[own].float(),
            batch.v_cache[own].float(),
            torch.tensor([0, end - begin], device=out.device),
            batch.lengths[own],
            batch.positions[new],
            **{**options, "ancestors": options["ancestors"][new]},
        )
    return out


def table(verdicts: Sequence[Verdict]) -> Table:
    """For `rich`."""
    shown = Table(title="tree attention", caption=f"{describe(hardware())}\n{describe(versions())}")
    for heading in ("case", "dtype", "error", "may be", "µs, trees", "µs, chains", ""):
        shown.add_column(heading)
    for verdict in verdicts:
        shown.add_row(
            verdict.case,
            verdict.dtype,
            "not finite" if verdict.error is None else f"{verdict.error:.1e}",
            f"{verdict.limit:.1e}",
            f"{verdict.tree_seconds * 1e6:.1f}",
            f"{verdict.chain_seconds * 1e6:.1f}",
            "" if verdict.good else "WRONG",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
