"""A process that decodes in another environment; `bench.peers.workers.protocol` is its side."""

from __future__ import annotations

import json
import select
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]


class WorkerError(Exception):
    """A worker failed, and this is why."""


@dataclass(frozen=True)
class Answer:
    """What a worker decoded.

    Attributes:
        tokens: new tokens of each row.
        seconds: prompts included.
        peak: bytes of the most memory that the process had so far.
    """

    tokens: list[list[int]]
    seconds: float
    peak: int


class Worker:
    """A worker that is ready for requests; leaving its `with` block ends it.

    Args:
        command: what to run.
        environment: its variables.
        time_limit: most seconds until it is ready, and for an answer.

    Attributes:
        version: what it says that it runs.
        ready_seconds: from its start until it was ready.

    Raises:
        WorkerError: it does not get ready.
    """

    def __init__(self, command: Sequence[str | Path], environment: dict[str, str], time_limit: float) -> None:
        self._time_limit = time_limit
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the worker
        started = time.perf_counter()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, cwd=ROOT, env=environment
        )
        try:
            self.version = str(self._answer()["ready"])
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def decode(self, prompts: list[list[int]], new_tokens: int) -> Answer:
        """Greedy continuations by `new_tokens` tokens each. Raises WorkerError if there are none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._end()) from error
        answer = self._answer()
        return Answer(answer["tokens"], answer["seconds"], answer["peak_bytes"])

    def close(self) -> None:
        """End the process, which may be busy."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self._time_limit)[0]:
            raise WorkerError(f"no answer within {self._time_limit:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _end(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        said = self._log.read().strip().splitlines() or [""]
        return f"it ended with status {status}: {said[-1]}"


def serving(python: Path, worker: str, folder: Path, options: dict[str, Any]) -> list[str | Path]:
    """The command of a worker that answers requests."""
    return [python, "-m", worker, "serve", folder, json.dumps(options)]


def convert(python: Path, worker: str, source: Path, target: Path, dtype: str) -> None:
    """Have a worker make what it reads, `target`, of a model of transformers. Raises WorkerError if it cannot."""
    site = sysconfig.get_path("purelib")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        draft = Path(scratch) / target.name
        draft.mkdir()
        command: list[str | Path] = [python, "-m", worker, "convert", source, draft, dtype, site]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise WorkerError(json.loads(done.stdout)["error"] if done.stdout else said[-1])
        draft.rename(target)
