"""Lower the step graph through Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.ops import source_hash

if TYPE_CHECKING:
    from emssd_compile.passes.manager import Pass

# Inductor's checks of its own output cost 7 % of a step of 8 rows of a small model on a CPU; a wrapper in Python, where
# it can be C++, another 10 %.
_OPTIONS = {
    "size_asserts": False,
    "alignment_asserts": False,
    "triton.cudagraphs": False,  # the runtime captures whole steps itself
}
_SLOTS = ("token_slots", "logit_slots", "draft_slots", "row_slots")


class InductorStep:
    """The step as one compiled function, compiled when it is first called and once for all sizes.

    The graph goes to Inductor as it is. `torch.compile` would trace it again and check guards at every call; there is
    nothing to guard: only the lengths of the slot inputs vary, and these are unbacked symbols, about which the compiler
    may assume nothing. So a length of 1, or two lengths that happen to be equal, compiles nothing anew.

    Args:
        graph_module: level L3, or what a target's passes made of it; it is not changed.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self._names: tuple[str, ...] = ()
        self._run: Callable[..., Any] | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Inputs in the order of the placeholders; results by name."""
        if self._run is None:
            self._compile()
        assert self._run is not None
        return dict(zip(self._names, self._run(*inputs), strict=True))

    def _compile(self) -> None:
        from torch._inductor.compile_fx import compile_fx

        graph = fx.Graph()
        results = graph.graph_copy(self.graph_module.graph, {})
        assert isinstance(results, dict)
        self._names = tuple(results)
        graph.output(tuple(results.values()))
        graph_module = fx.GraphModule(self.graph_module, graph, class_name="Step")
        fake_mode = FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        inputs = [_fake(node, fake_mode) for node in placeholders]
        for node, value in zip(placeholders, inputs, strict=True):
            node.meta["val"] = value  # with a C++ wrapper, Inductor takes its inputs from here
        # Inductor's cache on disk does not look into custom ops: it would serve a graph compiled for an older form of
        # ours.
        tag = torch.compiler.config.patch(cache_key_tag=f"emssd-{source_hash()}")  # type: ignore[attr-defined]
        with tag, torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
            options = {**_OPTIONS, "cpp_wrapper": inputs[0].device.type == "cpu"}
            self._run = cast("Callable[..., Any]", compile_fx(graph_module, inputs, config_patches=options))


def passes(device: torch.device) -> tuple[Pass, ...]:
    """Packed weights on a CPU; on a GPU, Inductor's own choices are good."""
    from emssd_compile.passes.pack_linears import PackLinears  # brings sympy: not needed to import the package

    return (PackLinears(),) if device.type == "cpu" else ()


def lower(graph_module: fx.GraphModule) -> InductorStep:
    """See `InductorStep`."""
    return InductorStep(graph_module)


def _fake(node: fx.Node, fake_mode: FakeTensorMode) -> Tensor:
    """An input of the compiled function: like the graph's, but slot inputs have a length nothing is known about."""
    value: Tensor = node.meta["val"]
    shape: list[Any] = [int(size) for size in value.shape] if str(node.target) not in _SLOTS else [_unknown(fake_mode)]
    with fake_mode:
        return torch.empty(shape, dtype=value.dtype, device=value.device)


def _unknown(fake_mode: FakeTensorMode) -> torch.SymInt:
    shape_env = fake_mode.shape_env
    assert shape_env is not None
    with shape_env.ignore_fresh_unbacked_symbols():
        size = shape_env.create_unbacked_symint()
    torch._check(size >= 0)
    return size
