"""AOTInductor: the step as machine code in a `.pt2` package, which needs neither the model nor a compiler.

It needs no Python either (`examples/cpp`). Packages are for CPUs: those for a GPU compile, and then torch's loader
ends the process.
"""

from __future__ import annotations

from emssd_compile.export.aot.package import environment, open_package, passes, require, write_package
from emssd_compile.export.target import Target

TARGET = Target(
    name="aot",
    passes=passes,
    write=write_package,
    open=open_package,
    environment=environment,
    require=require,
    devices=("cpu",),
)

__all__ = ["TARGET"]
