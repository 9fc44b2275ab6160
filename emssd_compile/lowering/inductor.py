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
    from emssd_compile.lowering.regions import Pieces
    from emssd_compile.passes.manager import Pass

BYTES_PER_CALL = 128 << 20  # of weights: a call of a piece takes some 70 us, 2 % of what reading so many takes a CPU


class InductorStep:
    """The step as compiled functions, compiled when it is first called and once for all sizes.

    There is one function, or one for each kind of layer that repeats and for what is between (`regions`). Graphs go to
    Inductor as they are. `torch.compile` would trace them again and check guards at every call; there is nothing to
    guard: only the lengths of the slot inputs vary, and about these the compiler assumes nothing (see `UnbackedGraph`).

    Args:
        graph_module: level L3, or what a target's passes made of it; it is not changed.
        deterministic: measure nothing while compiling, so that the same kernels come out.
    """

    def __init__(self, graph_module: fx.GraphModule, deterministic: bool = False) -> None:
        self.graph_module = graph_module
        self._deterministic = deterministic
        self._pieces: Pieces | None = None
        self._weights: tuple[tuple[dict[str, Any], str], ...] = ()
        self._runs: tuple[Callable[..., Any], ...] = ()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Inputs in the order of the placeholders; results by name.

        Raises:
            BackendError: Inductor fails to compile the step, at the first call.
        """
        if self._pieces is None:
            self._compile()
        pieces = self._pieces
        assert pieces is not None
        # Weights are read anew in each call: the graph module gets what is put in the place of one, too.
        values: list[Any] = [*inputs, *(store[name] for store, name in self._weights)]
        values += [None] * (pieces.num_values - len(values))
        for call in pieces.calls:
            returned = self._runs[call.piece](*[values[number] for number in call.taken])
            for number, value in zip(call.returned, returned, strict=True):
                values[number] = value
            for number in call.dropped:
                values[number] = None
        return {name: values[number] for name, number in pieces.results.items()}

    def _compile(self) -> None:
        from emssd_compile.lowering.regions import cut  # brings sympy: not needed to import the package

        pieces = cut(self.graph_module)
        stores = [getattr(self.graph_module, kind) for kind in ("_parameters", "_buffers")]
        self._weights = tuple((next(s for s in stores if name in s), name) for name in pieces.weights)
        self._runs = tuple(map(self._compile_piece, pieces.graph_modules))
        self._pieces = pieces

    def _compile_piece(self, piece: fx.GraphModule) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.exc import InductorError

        from emssd_compile.lowering.unbacked import OPTIONS, SizeTakenError, unbacked

        graph = unbacked(piece)
        # On a CPU a wrapper in Python costs another 10 % of a step of 8 rows of a small model. Compiled apart from the
        # kernels it need not be optimised: 30 layers start in less than half the time, and steps take what they took.
        on_cpu = graph.inputs[0].device.type == "cpu"
        options = {
            **OPTIONS,
            "cpp_wrapper": on_cpu,
            "cpp_wrapper_build_separate": on_cpu,
            "deterministic": self._deterministic,
        }
        try:
            with compiling, graph.compiling():
                compiled = compile_fx(graph.graph_module, graph.inputs, config_patches=options)
        except (InductorError, SizeTakenError, OSError) as error:
            raise BackendError(
                f'Inductor cannot compile the step: {reason(error)}; if that cannot be mended, backend="eager" runs it '
                "as it is"
            ) from error
        return cast("Callable[..., Any]", compiled)


def require(device: torch.device) -> None:
    """Raises BackendError if there is no place for what Inductor compiles, or no compiler for a CPU."""
    require_cache()
    require_compiler(device)


def passes(device: torch.device) -> tuple[Pass, ...]:
    """Our own products on a CPU, and layers compiled once; on a GPU, Inductor's own choices are good."""
    from emssd_compile.passes.group_linears import GroupLinears  # brings sympy: not needed to import the package
    from emssd_compile.passes.hoist_scales import HoistScales
    from emssd_compile.passes.mark_regions import MarkRegions
    from emssd_compile.passes.raise_linears import RaiseLinears

    return (RaiseLinears(), HoistScales(), GroupLinears(), MarkRegions(BYTES_PER_CALL)) if device.type == "cpu" else ()


def lower(graph_module: fx.GraphModule, deterministic: bool = False) -> InductorStep:
    """The graph, to be compiled when it is first called."""
    return InductorStep(graph_module, deterministic)
