"""Files that are read back later, by this process or another: whole, or not there; and where they are kept."""

from __future__ import annotations

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
