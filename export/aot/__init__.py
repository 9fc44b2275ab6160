"""AOTInductor: the step as machine code in a `.pt2` package, for torch without Python's help, or C++ without Python."""

from __future__ import annotations

from emssd_compile.export.aot.package import environment, open_package, passes, write_package
from emssd_compile.export.target import Target

TARGET = Target(
    name="aot",
    passes=passes,
    write=write_package,
    open=open_package,
    environment=environment,
)

__all__ = ["TARGET"]
