"""Artifacts on disk: written whole or not at all, and read only as they were written."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from emssd_compile.errors import ArtifactError
from emssd_compile.export import manifest
from emssd_compile.export.manifest import Manifest

_MOST_MANIFEST = 16 << 20  # bytes; those of real models have thousands


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write to that becomes `destination` at the end; if anything fails, nothing is left behind.

    Raises:
        ArtifactError: `destination` exists, or cannot be written (no permission, disk full).
    """
    check_new(destination)
    destination = destination.resolve()  # a link cannot be replaced by a folder, what it points to can
    with _explained(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        with _explained(destination):
            yield draft
            draft.chmod(0o777 & ~_umask())  # mkdtemp's is private
            _flush_folder(draft)
            draft.replace(destination)
            _flush_folder(destination.parent)  # or a power cut may undo the rename
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_new(destination: Path) -> None:
    """Raises ArtifactError unless a folder can be put in this place: nothing is there, or an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ArtifactError(f"{destination} exists; pass another folder, or remove it")
    place = destination.resolve()
    if place == Path.cwd() or place.is_mount():
        what = "a mount point" if place.is_mount() else "the folder that this process works in"
        raise ArtifactError(f"{destination} is {what}, which cannot be replaced; pass a new folder inside it")


def seal(folder: Path, unsealed: Callable[[dict[str, Any]], Manifest]) -> Manifest:
    """Hash all files of a folder and write its manifest, last of all: without one, nothing loads."""
    for path in _files(folder):
        _flush(path)
    sealed = unsealed(fingerprints(folder))
    (folder / manifest.NAME).write_bytes(sealed.to_bytes())
    _flush(folder / manifest.NAME)
    return sealed


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a folder, by name."""
    found = {}
    for path in _files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact; its files are not looked at.

    Raises:
        ArtifactError: there is none, or it is not as it was written.
    """
    what = "no such folder" if not folder.is_dir() else f"no {manifest.NAME} in it that can be read"
    try:
        with _open(folder, manifest.NAME) as file:
            data = file.read(_MOST_MANIFEST + 1)
    except (OSError, ValueError) as error:
        reason = f"{folder} is no artifact: {what} ({_reason(error)}); pass a folder that an export wrote"
        raise ArtifactError(reason) from error
    if len(data) > _MOST_MANIFEST:
        raise ArtifactError(f"{folder / manifest.NAME} is no manifest of an artifact: it is too large; export again")
    return Manifest.from_bytes(data, str(folder / manifest.NAME))


class Files:
    """The files of an artifact that its manifest names, open: what is read is what was compared.

    Whatever is put in a file's place afterwards is not looked at. Files that the manifest does not name are nobody's
    business: no target can read one.

    Args:
        folder: the artifact.
        entries: size and SHA-256 of each file, by name (`Manifest.files`).

    Raises:
        ArtifactError: a file is missing, cut, changed, or no file at all; says which and how.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        self._entries = entries
        self._held = contextlib.ExitStack()
        self._opened: dict[str, BufferedReader] = {}
        with contextlib.ExitStack() as undo:
            undo.push(self)
            for name in entries:
                self._opened[name] = self._held.enter_context(self._open(name))
            undo.pop_all()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *raised: object) -> None:
        self._held.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all files."""
        return tuple(self._entries)

    def read(self, name: str) -> bytes:
        """What is in a file, and was when the artifact was written. Raises ArtifactError if it is not named."""
        file = self._find(name)
        file.seek(0)
        data = file.read(self._entries[name]["bytes"])
        if hashlib.sha256(data).hexdigest() != self._entries[name]["sha256"]:  # it was written to in the meantime
            raise self._changed(name)
        return data

    def map(self, name: str) -> mmap.mmap | bytes:
        """A file in memory as far as it is read: for what is too large to be there twice."""
        file = self._find(name)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self._entries[name]["bytes"] else b""

    def path(self, name: str) -> Path:
        """A path to the opened file, for libraries that take no other; it is valid as long as the files are open."""
        file = self._find(name)
        return Path(f"/proc/self/fd/{file.fileno()}") if sys.platform == "linux" else self.folder / name

    def _find(self, name: str) -> BufferedReader:
        if name not in self._opened:
            raise ArtifactError(f"{self.folder} has no {name} among the files of its manifest; export again")
        return self._opened[name]

    def _open(self, name: str) -> BufferedReader:
        path, expected = self.folder / name, self._entries[name]
        try:
            file = _open(self.folder, name)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} is missing; copy the whole folder, or export again") from error
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} cannot be read ({_reason(error)}); copy the folder with what is in it"
            ) from error
        size = os.fstat(file.fileno()).st_size
        if size != expected["bytes"]:
            file.close()
            raise ArtifactError(f"{path} has {size} bytes, {expected['bytes']} were written; copy it again")
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            file.close()
            raise self._changed(name)
        return file

    def _changed(self, name: str) -> ArtifactError:
        return ArtifactError(f"{self.folder / name} is not what was written: its SHA-256 differs; copy it again")


def _open(folder: Path, name: str) -> BufferedReader:
    """Open a file of a folder. Raises OSError unless it is a regular file in the folder itself, behind no link."""
    path = folder / name
    if Path(os.path.realpath(path)) != Path(os.path.realpath(folder)) / name:
        raise OSError(f"{name} is a link, or lies behind one")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a fifo would wait for a writer
    file = open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb")  # noqa: PTH123, SIM115  # held by the caller
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{name} is no regular file")
    return file


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Have a folder's own entries written, where the platform opens folders and the file system flushes them."""
    with contextlib.suppress(OSError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _explained(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        where = f" ({error.filename})" if error.filename else ""  # perhaps a file that the target reads, elsewhere
        raise ArtifactError(f"{destination} cannot be written: {reason}{where}; nothing was left behind") from error
