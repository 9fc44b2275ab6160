"""The way through the house: capture, then the levels of passes, for one model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile import passes
from emssd_compile.capture import capture
from emssd_compile.dumping import active_observers
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import load_kernels
from emssd_compile.passes import BatchShape, PassManager, PassRecord
from emssd_compile.passes.graph import caches, placeholder, results
from emssd_compile.passes.manager import Pass
from emssd_compile.step.acceptance import Rule
from emssd_compile.step.drafting import Drafter, TensorSpec
from emssd_compile.step.pack import Packed
from emssd_compile.step.policy import LengthPolicy


@dataclass
class CompiledModel:
    """A causal LM at level L2: callable on packed rows.

    Attributes:
        graph_module: the L2 graph.
        fake_mode: the mode its fake values belong to.
        vocabulary: V.
        cache_shapes: its KV caches by name, `k_cache_<layer>` and `v_cache_<layer>`, each `[B, C, Hkv, D]`.
        records: what each pass did.
    """

    graph_module: fx.GraphModule
    fake_mode: FakeTensorMode
    vocabulary: int
    cache_shapes: dict[str, TensorSpec]
    records: list[PassRecord] = field(default_factory=list)

    def __call__(
        self, packed: Packed, lengths: Tensor, logit_index: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[T, H]` and logits `[R, V]`; writes the KV of the packed tokens into `caches`."""
        hidden, logits = self.graph_module(
            packed.input_ids,
            packed.positions,
            packed.row_ids,
            packed.offsets,
            lengths,
            logit_index,
            *(caches[name] for name in self.cache_shapes),
        )
        return hidden, logits


def compile_model(model: nn.Module, batch: BatchShape) -> CompiledModel:
    """Capture `model` and rewrite it to level L2.

    Raises:
        InvalidInputError: the model is in training mode or its weights are unusable.
        UnsupportedModelError: the model cannot be captured, or a pass cannot prove its rewrite right.
    """
    graph_module = capture(model)
    ids = placeholder(graph_module.graph, "input_ids").meta["val"]
    fake_mode: FakeTensorMode = ids.fake_mode
    load_kernels(ids.device.type)  # before anything runs: the comparison with the model is to use them, too
    _check_capacity(batch.capacity, ids.shape[1])
    manager = PassManager(fake_mode, active_observers())
    manager.apply(graph_module, (passes.captured(), passes.canonical(batch), passes.unpadded(batch, fake_mode)))
    passes.drop_unused_weights(graph_module)
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in caches(graph_module.graph).items()}
    vocabulary = int(results(graph_module.graph)[1].meta["val"].shape[-1])
    return CompiledModel(graph_module, fake_mode, vocabulary, specs, manager.records)


def _check_capacity(capacity: int, tokens: torch.SymInt) -> None:
    """A table or a branch of the forward may end at some number of tokens; the graph is right up to there only."""
    most = tokens.node.shape_env.bound_sympy(tokens.node.expr).upper
    if capacity > most:
        raise UnsupportedModelError(
            f"max_length={capacity}, but the forward has a table or a branch on the length that ends at {most} tokens",
            remedy=f"pass max_length={most} or less",
        )


def compile_step(
    compiled: CompiledModel,
    batch: BatchShape,
    rule: Rule,
    drafter: Drafter,
    policy: LengthPolicy,
    target: tuple[Pass, ...] = (),
) -> fx.GraphModule:
    """Level L3: the whole decoding step of a compiled model as one graph, in the form that the target's passes give it.

    Its inputs are named.
    """
    graph_module = fx.GraphModule(compiled.graph_module, _copy(compiled.graph_module.graph), class_name="Step")
    manager = PassManager(compiled.fake_mode, active_observers(), compiled.records)
    levels = (passes.step(batch, rule, drafter, policy, compiled.fake_mode), passes.targeted(target))
    return manager.apply(graph_module, levels)


def _copy(source: fx.Graph) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(source, values))
    return graph


__all__ = ["BatchShape", "CompiledModel", "compile_model", "compile_step"]
