"""Lower the step graph through Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from emssd_compile.ambient import compiling
from emssd_compile.errors import BackendError
from emssd_compile.lowering.toolchain import reason, require_cache, require_compiler

if TYPE_CHECKING:
    from emssd_compile.passes.manager import Pass


class InductorStep:
    """The step as one compiled function, compiled when it is first called and once for all sizes.

    The graph goes to Inductor as it is. `torch.compile` would trace it again and check guards at every call; there is
    nothing to guard: only the lengths of the slot inputs vary, and about these the compiler assumes nothing (see
    `UnbackedGraph`).

    Args:
        graph_module: level L3, or what a target's passes made of it; it is not changed.
        deterministic: measure nothing while compiling, so that the same kernels come out.
    """

    def __init__(self, graph_module: fx.GraphModule, deterministic: bool = False) -> None:
        self.graph_module = graph_module
        self._deterministic = deterministic
        self._names: tuple[str, ...] = ()
        self._weights: tuple[tuple[dict[str, Any], str], ...] = ()
        self._run: Callable[..., Any] | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Inputs in the order of the placeholders; results by name.

        Raises:
            BackendError: Inductor fails to compile the step, at the first call.
        """
        if self._run is None:
            self._compile()
        assert self._run is not None
        # Read anew in each call: where another tensor is put in place of a weight, the graph module gets it, too.
        weights = [store[name] for store, name in self._weights]
        return dict(zip(self._names, self._run(*inputs, *weights), strict=True))

    def _compile(self) -> None:
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.exc import InductorError

        # These bring sympy: not needed to import the package.
        from emssd_compile.lowering.unbacked import OPTIONS, lift_weights, unbacked

        graph, names = lift_weights(unbacked(self.graph_module))
        # On a CPU a wrapper in Python costs another 10 % of a step of 8 rows of a small model. Compiled apart from the
        # kernels it need not be optimised: 30 layers start in less than half the time, and steps take what they took.
        on_cpu = graph.inputs[0].device.type == "cpu"
        options = {
            **OPTIONS,
            "cpp_wrapper": on_cpu,
            "cpp_wrapper_build_separate": on_cpu,
            "deterministic": self._deterministic,
        }
        stores = [getattr(self.graph_module, kind) for kind in ("_parameters", "_buffers")]
        self._weights = tuple((next(s for s in stores if name in s), name) for name in names)
        try:
            with compiling, graph.compiling():
                self._names = graph.result_names
                compiled = compile_fx(graph.graph_module, graph.inputs, config_patches=options)
        except (InductorError, OSError) as error:
            raise BackendError(
                f'Inductor cannot compile the step: {reason(error)}; if that cannot be mended, backend="eager" runs it '
                "as it is"
            ) from error
        self._run = cast("Callable[..., Any]", compiled)


def require(device: torch.device) -> None:
    """Raises BackendError if there is no place for what Inductor compiles, or no compiler for a CPU."""
    require_cache()
    require_compiler(device)


def passes(device: torch.device) -> tuple[Pass, ...]:
    """Our own products on a CPU; on a GPU, Inductor's own choices are good."""
    from emssd_compile.passes.group_linears import GroupLinears  # brings sympy: not needed to import the package
    from emssd_compile.passes.raise_linears import RaiseLinears

    return (RaiseLinears(), GroupLinears()) if device.type == "cpu" else ()


def lower(graph_module: fx.GraphModule, deterministic: bool = False) -> InductorStep:
    """The graph, to be compiled when it is first called."""
    return InductorStep(graph_module, deterministic)
