"""Attention over packed rows, kernel by kernel: time, bytes a second, share of the bandwidth, error.

    python -m bench.kernels
    python -m bench.kernels --device cuda --dtype bfloat16 --rows 1 8 32 --contexts 2048 8192 --json kernels.json

Bytes are what no kernel can avoid: keys and values of every row once, queries and output. The bandwidth is measured; a
case that fits into the device's cache can beat it. The error is the largest difference from the reference in float32,
over the largest value. Forms take turns; figures are medians. On CUDA, calls are replayed as one graph where the form
allows it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench.command import (
    argument_parser,
    at_least,
    describe,
    hardware,
    make_console,
    make_progress,
    parse,
    save,
    versions,
)
from bench.kernel_cases import Case, expected_output, make_inputs
from bench.measure import call_seconds, memory_bandwidth
from bench.timing import alternate
from emssd_compile.ops import cpu_kernel_status, load_cpu_kernels
from emssd_compile.ops._ragged_attention import reference

Attention = Callable[..., Tensor]
_LARGEST_GATHER = 4 * 2**30
"""The reference copies a row's keys and values for every token, in float32: bytes past which it is not timed."""


@dataclass(frozen=True)
class Figures:
    """What a form took.

    Attributes:
        seconds: of one call, the median over the repeats.
        bytes_per_second: `Case.num_bytes` over `seconds`.
        bandwidth_share: of the measured one.
        error: largest difference from the reference in float32, over its largest value.
    """

    seconds: float
    bytes_per_second: float
    bandwidth_share: float
    error: float


@dataclass(frozen=True)
class Measurement:
    """One form on one case.

    Attributes:
        case: the case.
        form: name of the form.
        figures: what it took; `None` if it could not be measured.
        why_not: the reason, else empty.
    """

    case: Case
    form: str
    figures: Figures | None = None
    why_not: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    options = parse_arguments(arguments)
    console = make_console()
    bandwidth = memory_bandwidth(options.device, options.repeats)
    cases = [
        Case(rows, context, tokens, *heads)
        for heads, context, rows, tokens in itertools.product(
            options.heads, options.contexts, options.rows, options.tokens
        )
    ]
    found: list[Measurement] = []
    with make_progress(console) as progress:
        for case in progress.track(cases, description="timing kernels"):
            found += measure(case, options.device, options.dtype, bandwidth, options.repeats)
            if options.json:
                save(options.json, "bench.kernels", [record(found, bandwidth)], dtype=str(options.dtype))
    console.print(table(found, bandwidth, str(options.dtype)))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[1, 8], help="B (default: %(default)s)")
    parser.add_argument("--contexts", type=at_least(0), nargs="+", default=[128, 1024], help="(default: %(default)s)")
    parser.add_argument(
        "--tokens", type=at_least(1), nargs="+", default=[1, 8], help="K + 1, of each row (default: %(default)s)"
    )
    parser.add_argument(
        "--heads",
        type=_heads,
        nargs="+",
        default=[(8, 2, 64)],
        metavar="Hq/Hkv/D",
        help="e.g. 32/8/128 (default: 8/2/64)",
    )
    return parse(parser, arguments)


def _heads(text: str) -> tuple[int, int, int]:
    try:
        heads, kv_heads, head_size = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: query heads/kv heads/head size are needed, e.g. 32/8/128"
        ) from None
    if min(heads, kv_heads, head_size) < 1 or heads % kv_heads:
        raise argparse.ArgumentTypeError(f"{text!r}: kv heads must divide query heads")
    return heads, kv_heads, head_size


def forms(device: torch.device) -> dict[str, Attention | str]:
    """Every form by name; for one that this machine lacks, why."""
    found: dict[str, Attention | str] = {"reference": reference}
    if device.type == "cpu":
        found["C++"] = torch.ops.emssd.ragged_attention.default if load_cpu_kernels() else cpu_kernel_status()
        return found
    modules = {
        "Triton": ("ragged_attention", "ragged_attention_triton"),
        "varlen_attn": ("varlen", "ragged_attention_varlen"),
    }
    return found | {name: _triton_form(*place) for name, place in modules.items()}


def _triton_form(module: str, function: str) -> Attention | str:
    try:
        form: Attention = getattr(importlib.import_module(f"emssd_compile.ops.triton.{module}"), function)
    except ImportError as error:  # no Triton, or a torch that lacks something
        return f"{type(error).__name__}: {error}"
    return form


def measure(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    repeats: int,
    named: dict[str, Attention | str] | None = None,
) -> list[Measurement]:
    """Every form on one case, alternating.

    Args:
        case: what to compute.
        device: where.
        dtype: of queries, keys and values.
        bandwidth: bytes a second, of `memory_bandwidth`.
        repeats: of each form.
        named: the forms, as `forms` gives them.
    """
    inputs = make_inputs(case, device, dtype)
    options = {"scale": case.head_size**-0.5}
    expected = expected_output(inputs, options["scale"])
    runs: dict[str, Callable[[], Tensor]] = {}
    errors: dict[str, float] = {}
    why_not: dict[str, str] = {}
    for name, form in (named or forms(device)).items():
        if name == "reference" and case.reference_bytes > _LARGEST_GATHER:
            form = f"it would copy {case.reference_bytes / 2**30:.0f} GiB"
        if isinstance(form, str):
            why_not[name] = form
            continue
        run = partial(form, *inputs, **options)
        try:
            errors[name] = float((run().float() - expected).abs().max() / expected.abs().max())
        except Exception as failure:  # a kernel that cannot do this case must not take the others' figures along
            why_not[name] = _last_line(failure)
            continue
        if not math.isfinite(errors[name]):
            why_not[name] = "its output is not finite"
            continue
        runs[name] = run
    calls = {name: partial(call_seconds, run, device) for name, run in runs.items()}
    times = alternate(calls, repeats) if calls else {}
    found = [Measurement(case, name, why_not=reason) for name, reason in why_not.items()]
    for name, (_, *repeated) in times.items():
        seconds = statistics.median(repeated)
        rate = case.num_bytes(dtype.itemsize) / seconds
        found.append(Measurement(case, name, Figures(seconds, rate, rate / bandwidth, errors[name])))
    return found


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1]}"


def record(found: Iterable[Measurement], bandwidth: float) -> dict[str, Any]:
    """The table as JSON values."""
    return {
        "title": "attention kernels",
        "bandwidth_bytes_per_second": bandwidth,
        "rows": [
            {
                **asdict(item.case),
                "form": item.form,
                **(asdict(item.figures) if item.figures else {"why_not": item.why_not}),
            }
            for item in found
        ],
    }


def table(found: Iterable[Measurement], bandwidth: float, dtype: str) -> Table:
    """For `rich`."""
    shown = Table(
        title=f"attention over packed rows, {dtype}; measured bandwidth {bandwidth / 1e9:.1f} GB/s",
        caption=f"{describe(hardware())}\n{describe(versions())}",
    )
    shown.add_column("Hq/Hkv/D")
    for heading in ("rows", "context", "T", "form", "µs", "GB/s", "of bandwidth", "error"):
        shown.add_column(heading, justify="left" if heading == "form" else "right")
    for item in found:
        case = item.case
        figures = ["-"] * 4
        if f := item.figures:
            rate = f.bytes_per_second / 1e9
            figures = [f"{f.seconds * 1e6:.1f}", f"{rate:.1f}", f"{f.bandwidth_share:.0%}", f"{f.error:.1e}"]
        shown.add_row(
            f"{case.heads}/{case.kv_heads}/{case.head_size}",
            str(case.rows),
            str(case.context),
            str(case.rows * case.tokens),
            item.form + (f": {item.why_not}" if item.why_not else ""),
            *figures,
        )
    return shown


if __name__ == "__main__":
    main()
