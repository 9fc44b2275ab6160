"""Files that are read back later, by this process or another: whole, or not there; and where they are kept."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path


def cache_folder() -> Path:
    """Where to keep what can be made anew: ``$EMSSD_CACHE_DIR``, else a folder of ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Nothing can be written there where there is no home.
    """
    chosen = os.environ.get("EMSSD_CACHE_DIR")
    if chosen:
        return Path(chosen)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111  # Path's raises
    return (caches if caches.is_absolute() else Path(os.devnull)) / "emssd_compile"


def hash_of_sources(folder: Path) -> str:
    """SHA-256 (hex) of every source file in a folder and below it, also behind links."""
    digest = hashlib.sha256()
    paths = (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    for path in sorted(path for path in paths if path.suffix in {".py", ".cpp", ".h"}):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file such that who reads it sees all of it, or what was there before: also after a power cut."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
