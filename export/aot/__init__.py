"""AOTInductor: the step as machine code in a `.pt2` package, which needs neither the model nor a compiler.

On a CPU it needs no Python either (`examples/cpp`). On a GPU the ops of this project are Triton kernels that Python
launches, so there it does; and no GPU has run a package yet.
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
)

__all__ = ["TARGET"]
