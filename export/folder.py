"""Artifacts on disk: written whole or not at all, and read only as they were written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emssd_compile.errors import ArtifactError
from emssd_compile.export import manifest
from emssd_compile.export.manifest import Manifest


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
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    sealed = unsealed({path.relative_to(folder).as_posix(): _fingerprint(path) for path in files})
    (folder / manifest.NAME).write_bytes(sealed.to_bytes())
    _flush(folder / manifest.NAME)
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact; its files are not looked at.

    Raises:
        ArtifactError: there is none, or it is not as it was written.
    """
    file = folder / manifest.NAME
    try:
        data = file.read_bytes()
    except OSError as error:
        what = "no such folder" if not folder.is_dir() else f"no {manifest.NAME} in it that can be read"
        raise ArtifactError(f"{folder} is no artifact: {what}; pass a folder that an export wrote") from error
    return Manifest.from_bytes(data, str(file))


def check_files(folder: Path, sealed: Manifest) -> None:
    """Compare every file with what the manifest says; files that it does not name are nobody's business.

    No target reads one: what names the files that it reads (a model, its weights) is named in the manifest itself.

    Raises:
        ArtifactError: a file is missing, cut or changed; says which and how.
    """
    for name, expected in sealed.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; copy the whole folder, or export again")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ArtifactError(f"{path} has {size} bytes, {expected['bytes']} were written; copy it again")
        if _fingerprint(path) != expected:
            raise ArtifactError(f"{path} is not what was written: its SHA-256 differs; copy it again")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
