"""The tiled form of a step, run by whatever calls itself a `StepFunction`, behind the usual `generate`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from emssd_compile.lowering import StepFunction
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.passes.graph import inputs
from emssd_compile.passes.tile_attention import TileAttention
from emssd_compile.runtime.launch import DirectLauncher, Variant
from emssd_compile.step.signature import Signature


def tile_step(fast: OptimizedModel) -> fx.GraphModule:
    """The step after `tile_attention`; still a step, or the level's verifier raises."""
    return fast._step.for_target((TileAttention(),), [])


class EagerStep:
    """A tiled graph as a `StepFunction`: KV caches are changed in place and are not among the results."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.names = [str(node.target) for node in inputs(graph_module.graph)]

    def __call__(self, *values: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            results: dict[str, Tensor] = self.graph_module(*values)
        for name, value in zip(self.names, values, strict=True):
            if "_cache_" in name:
                value.copy_(results.pop(name))
        return results


def run_with(fast: OptimizedModel, graph_module: fx.GraphModule, step: StepFunction) -> OptimizedModel:
    """`fast`, from now on with `step`, which runs the tiled `graph_module`, and zeroed KV caches of that form."""
    nodes = {str(node.target): node.meta["val"] for node in inputs(graph_module.graph)}
    tensors = dict(fast._engine.tensors)
    for name, value in nodes.items():
        if "_cache_" in name:
            tensors[name] = torch.zeros([int(size) for size in value.shape], dtype=value.dtype)
    variant = Variant(step, Signature.of(graph_module.graph, fast._step.roles, fast._step.options))
    fast._engine.launcher = DirectLauncher(variant, tensors)
    fast._engine.use(variant, {})
    fast._forms = {key: replace(form, variant=variant) for key, form in fast._forms.items()}
    return fast
