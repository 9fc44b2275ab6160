"""What every bench command shares: its arguments, its clock, the machine it names, its progress and its record."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Facts = dict[str, str | int | None]
Result = TypeVar("Result")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOG_WIDTH = 160
"""Columns of a table that is written to a file or a pipe, where there is no terminal to ask."""


def argument_parser(doc: str | None, *, repeats: int = 5, least_seconds: int | None = None) -> argparse.ArgumentParser:
    """A parser with the arguments of every bench command; hand it to `parse` when the command's own are added.

    Args:
        doc: the command's module docstring; its first line is the help's.
        repeats: default of `--repeats`.
        least_seconds: default of `--least-seconds`, for commands with runs so short that they scatter.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--device", type=_device, default="cpu", help="cpu or cuda (default: %(default)s)")
    names = ", ".join(DTYPES)
    parser.add_argument("--dtype", type=_dtype, help=f"{names} (default: float32 on cpu, float16 on cuda)")
    parser.add_argument(
        "--repeats", type=at_least(1), default=repeats, help="timed, alternating runs (default: %(default)s)"
    )
    if least_seconds is not None:
        parser.add_argument(
            "--least-seconds",
            type=at_least(0),
            default=least_seconds,
            metavar="SECONDS",
            help="more repeats until they took so long together (default: %(default)s)",
        )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write figures, hardware and versions there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the figures there, as PNG")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with `device` a `torch.device` and `dtype` a `torch.dtype` that suits it.

    Raises:
        SystemExit: an argument is unknown or wrong, or `--device cuda` is asked for where torch sees no GPU.
    """
    options = parser.parse_args(arguments)
    if options.dtype is None:
        options.dtype = torch.float32 if options.device.type == "cpu" else torch.float16
    return options


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: integers from `least` on."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: an integer of at least {least} is needed")
        return value

    return integer


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r}: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} sees no CUDA GPU here; use --device cpu")
    return torch.device(name)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """As it is written on the command line."""
    return next(name for name, known in DTYPES.items() if known is dtype)


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done all it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What `work` returns, and the seconds until `device` had done it."""
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - started


def hardware() -> Facts:
    """The machine that a figure depends on; `gpu` is `None` where there is none."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> Facts:
    """The software that a figure depends on; `None` where a package is not installed."""
    packages = ("torch", "transformers", "triton", "emssd_compile")
    return {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in packages},
    }


def describe(facts: Mapping[str, object]) -> str:
    """`hardware()` or `versions()` as one line for a caption; what is not there is left out."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


def _cpu_model() -> str:
    """The processor's marketing name where Linux tells it, else what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with its build: 2.13.0+cpu
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def make_console() -> Console:
    """A console for tables: as wide as the terminal, or `LOG_WIDTH` where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def make_progress(console: Console) -> Progress:
    """A bar that says what is being done, and goes when all is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def save(path: Path, module: str, tables: Sequence[Mapping[str, object]], **context: object) -> None:
    """Writes a record as JSON: command, date, hardware and versions, then `context`, then the tables.

    Args:
        path: its folder is made if it is not there.
        module: the command's, e.g. `"bench.speedup"`; arguments are those of this process.
        tables: one mapping a table, of JSON values.
        **context: what else was run with: model, dtype, ...
    """
    record = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        **context,
        "tables": list(tables),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
