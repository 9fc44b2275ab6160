"""Libraries that one target needs, and no other part of the package."""

from __future__ import annotations

import importlib
from typing import Any

from emssd_compile.errors import ArtifactError


def load_library(module: str, *, extra: str) -> Any:
    """The Python module of that name.

    Raises:
        ArtifactError: it cannot be imported; says why, and which extra of this package brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArtifactError(f'{module} cannot be imported ({error}): pip install "emssd_compile[{extra}]"') from error
