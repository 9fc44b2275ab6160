"""Runs parts one after the other, each in a process of its own: what fails or hangs takes nothing else along."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_suite.parts import Part

_ROOT = Path(__file__).parents[2]
_TAIL_LINES = {"passed": 30, "skipped": 5}
_FAILED_TAIL_LINES = 60


@dataclass(frozen=True)
class Outcome:
    """How a part went.

    Attributes:
        name: the part's.
        command: what was run.
        status: `"passed"`, `"failed"`, `"skipped"`, `"timed out"` or `"not started"`.
        seconds: wall time.
        output_tail: the last lines it printed; the traceback's end, if it failed.
        record: the JSON it wrote, as far as it came.
    """

    name: str
    command: str
    status: str
    seconds: float
    output_tail: list[str]
    record: dict[str, Any] | None

    @property
    def good(self) -> bool:
        """Whether the suite may pass."""
        return self.status in ("passed", "skipped")


def run_all(parts: Sequence[Part], limit_seconds: float) -> Iterator[Outcome]:
    """Each part's outcome as it ends; parts that the time does not suffice for are not started."""
    ends = time.monotonic() + limit_seconds
    for part in parts:
        left = ends - time.monotonic()
        if left <= 0:
            yield Outcome(part.name, " ".join(part.command), "not started", 0.0, ["the suite's time was used up"], None)
        else:
            yield run(part, min(part.limit_seconds, left))


def run(part: Part, limit_seconds: float) -> Outcome:
    """Run one part for at most `limit_seconds`; what it started is killed with it."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "record.json"), Path(folder, "log")
        arguments = [*part.command, *(["--json", str(path)] if part.writes_json else [])]
        started = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
        seconds = time.monotonic() - started
        record = _read(path)
        status = _status(code, record)
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    tail = [line.rstrip() for line in lines if line.strip()][-_TAIL_LINES.get(status, _FAILED_TAIL_LINES) :]
    return Outcome(part.name, " ".join(part.command), status, seconds, tail, record)


def _read(path: Path) -> dict[str, Any] | None:
    """A part's record; `None` if it wrote none, or was killed while it wrote."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record


def _status(code: int | None, record: dict[str, Any] | None) -> str:
    if code is None:
        return "timed out"
    if code != 0:
        return "failed"
    return "skipped" if record is not None and "skipped" in record else "passed"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the part and whatever it started: compilers run in processes of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
