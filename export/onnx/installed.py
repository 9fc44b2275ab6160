"""The libraries that this target needs, and no other part of the package."""

from __future__ import annotations

from importlib.util import find_spec

from emssd_compile.errors import ArtifactError


def require(*libraries: str) -> None:
    """Raises ArtifactError if one of the libraries is not installed; names it and the extra that brings it."""
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise ArtifactError(f'{" and ".join(missing)} not installed: pip install "emssd_compile[onnx]"')
