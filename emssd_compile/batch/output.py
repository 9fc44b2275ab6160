"""The output of a batch: whole lines in a file beside it, which takes its name when all is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from emssd_compile.batch.lines import Index
from emssd_compile.errors import OptionError

_MODEL_FILES = {".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt"}


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of all files of a model's folder that say what it does."""
    with _explained(path, "cannot be read"):
        if not path.is_dir():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        names = sorted(each.name for each in path.iterdir() if each.suffix in _MODEL_FILES)
        found = [f"{name} {fingerprint(path / name)}\n" for name in names]
        return hashlib.sha256("".join(found).encode()).hexdigest()


class Output:
    """What is done of a job, kept such that the same command can go on with it after any end, `kill -9` included.

    `out.jsonl.job` says what job it is, and is locked by whoever works on it. Results are appended to
    `out.jsonl.partial`, a line each; that becomes `out.jsonl` when all is done. A last line without an end was torn
    when the process died: it is cut off, and its prompt is decoded again.

    Args:
        path: of the output.
        job: what all results depend on, by names that a user knows; JSON.
        drawn: the part of it that nobody asked for: what an earlier run took holds on.

    Attributes:
        job: all of it.
        is_complete: whether there is nothing left to do.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self._file: int | None = None
        self._job_file: BinaryIO | None = None
        with _explained(path, "cannot be written"):
            self._job_file = path.with_name(f"{path.name}.job").open("a+b")
            try:
                self._begin(job, drawn)
            except BaseException:
                self.close()
                raise

    def _begin(self, job: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
        assert self._job_file is not None
        _lock(self._job_file, self.path)
        self.is_complete, is_begun = self.path.exists(), self._is_begun()
        earlier = self._read_job() if self.is_complete or is_begun else {}
        if not earlier:
            self._check_own()
        self.job = {**job, **{name: earlier.get(name, value) for name, value in drawn.items()}}
        if self.is_complete or is_begun:
            self._compare(earlier)

    def _is_begun(self) -> bool:
        """Whether there is a result: a command that was refused before the first is no other command."""
        return self.partial.exists() and self.partial.stat().st_size > 0

    def _check_own(self) -> None:
        """Raise OptionError if the file that is to say what job it is holds something else."""
        assert self._job_file is not None
        self._job_file.seek(0)
        held = self._job_file.read()
        try:
            is_own = not held or json.loads(held).keys() >= {"--input", "--model"}
        except (ValueError, AttributeError):
            is_own = False
        if not is_own:
            raise OptionError(
                f"{self._job_file.name} exists, and no batch has written it; pass another --output, or move it away"
            )

    def _read_job(self) -> dict[str, Any]:
        assert self._job_file is not None
        self._job_file.seek(0)
        try:
            earlier: dict[str, Any] = json.loads(self._job_file.read())
        except ValueError:
            Path(self._job_file.name).unlink()  # made just now, or damaged
            there = self.path if self.is_complete else self.partial
            raise OptionError(
                f"{there} exists, and no batch says what is in it; pass another --output, or remove it"
            ) from None
        return earlier

    def _compare(self, earlier: Mapping[str, Any]) -> None:
        """Raise OptionError if the output is that of another job."""
        names = [name for name in {**earlier, **self.job} if earlier.get(name) != self.job.get(name)]
        if names:
            differs = "; ".join(_difference(name, earlier.get(name), self.job.get(name)) for name in names)
            raise OptionError(
                f"--output {self.path} was begun by another command: {differs}. Give that command again, pass another "
                "--output, or remove this one"
            )

    def resume(self, index: Index) -> int:
        """Open it for writing, and note in the index what is done; returns how much that is.

        Raises:
            OptionError: it holds what no run of this job wrote.
        """
        assert self._job_file is not None
        with _explained(self.partial, "cannot be written"):
            if not self._is_begun():  # only once it is known whose it is
                self._job_file.truncate(0)
                self._job_file.write(json.dumps(self.job, indent=1).encode())
                self._job_file.flush()
                os.fsync(self._job_file.fileno())
            self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            count = size = 0
            with self.partial.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    if not index.finish(self._key(line)):
                        raise OptionError(
                            f"{self.partial}, line {count + 1}, is the result of no prompt, or one too many; no batch "
                            "has written that: remove the file to begin anew"
                        )
                    count, size = count + 1, size + len(line)
            os.ftruncate(self._file, size)
        return count

    @staticmethod
    def _key(line: bytes) -> str:
        try:
            return json.dumps(json.loads(line)["id"])
        except (ValueError, TypeError, KeyError):
            return ""

    def write(self, result: Mapping[str, Any]) -> None:
        """Append a result.

        Raises:
            OptionError: it cannot be written, such as on a full disk.
        """
        assert self._file is not None
        # Half of a surrogate pair is no UTF-8; as Python writes it instead, JSON does, too.
        left = json.dumps(result, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with _explained(self.partial, "cannot be written"):
            while left:
                left = left[os.write(self._file, left) :]

    def finish(self) -> None:
        """All is done: give it its name."""
        assert self._file is not None
        with _explained(self.path, "cannot be written"):
            os.fsync(self._file)
            self.partial.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)  # or a power cut may undo the renaming
            os.close(folder)
        self.is_complete = True

    def close(self) -> None:
        """Let others work on it."""
        if self._file is not None:
            os.close(self._file)
        if self._job_file is not None:
            self._job_file.close()
        self._file = self._job_file = None


def _difference(name: str, before: object, now: object) -> str:
    if name in ("--input", "--model"):
        return f"{name} held something else"
    return f"{name} was {json.dumps(before)}, and is {json.dumps(now)}"


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two at a time are not noticed there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OptionError(f"--output {path}: another process is writing it; wait for it, or end it") from None


@contextlib.contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        done = "; what is done is kept: mend that, and give the same command again" if what.endswith("written") else ""
        raise OptionError(f"{path} {what}: {error.strerror or error}{done}") from error
