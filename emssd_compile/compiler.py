"""The way through the house: capture, then the levels of passes, for one model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

from emssd_compile import passes
from emssd_compile.capture import capture
from emssd_compile.dumping import active_observers
from emssd_compile.errors import PartError, UnsupportedModelError
from emssd_compile.ops import kernel_status, load_kernels, ragged_attention
from emssd_compile.passes import PassManager, PassRecord
from emssd_compile.passes.block_tables import pageable
from emssd_compile.passes.fuse_step import FuseStep, sizes_of
from emssd_compile.passes.graph import (
    caches,
    copied,
    inputs,
    keep_values,
    output,
    placeholder,
    read_attributes,
    results,
)
from emssd_compile.passes.manager import Pass
from emssd_compile.passes.pack_caches import PackCaches
from emssd_compile.passes.page_caches import PageCaches
from emssd_compile.passes.ring_caches import RingCaches, reaches
from emssd_compile.passes.split_halves import Halves, split_halves
from emssd_compile.passes.token_tables import GraphTables
from emssd_compile.step.acceptance import Rule
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import Compile, Drafter, Target
from emssd_compile.step.fields import named
from emssd_compile.step.logits import LogitsProcessor
from emssd_compile.step.options import RowOption
from emssd_compile.step.pack import Packed, as_trees
from emssd_compile.step.paging import DRAFTER, Paging
from emssd_compile.step.parts import Part, in_use
from emssd_compile.step.policy import LengthPolicy
from emssd_compile.step.probe import Probe, ReadingSpec
from emssd_compile.step.rings import Rings
from emssd_compile.step.signature import Signature
from emssd_compile.step.tensor_spec import TensorSpec


@dataclass
class CompiledModel:
    """A causal LM at level L2: callable on packed rows.

    Attributes:
        graph_module: the L2 graph.
        batch: the sizes it was compiled for.
        fake_mode: the mode its fake values belong to.
        vocabulary: V.
        cache_shapes: its KV caches by name, `k_cache_<layer>` and `v_cache_<layer>`, each `[B, C, Hkv, D]`, or
            `[B, C + N, Hkv, D]` where rows may be trees of N tokens.
        records: what each pass did.
        looked_at: tensors of the model's whose values a pass has looked at, by their name in the captured graph: what
            was made of them may stand in the graph.
        taps: layers whose outputs `[T, H]` the graph returns behind hidden states and logits, as they were asked for.
    """

    graph_module: fx.GraphModule
    batch: BatchShape
    fake_mode: FakeTensorMode
    vocabulary: int
    cache_shapes: dict[str, TensorSpec]
    records: list[PassRecord] = field(default_factory=list)
    looked_at: dict[str, Tensor] = field(default_factory=dict)
    taps: tuple[int, ...] = ()

    @property
    def capacity(self) -> int:
        """C, tokens that a row of its KV caches can hold."""
        return self.batch.capacity

    @property
    def ancestor_words(self) -> int:
        """W, words of `Packed.ancestors`; 0 where it was compiled for chains."""
        return self.batch.ancestor_words

    def tapped(self, taps: tuple[int, ...]) -> CompiledModel:
        """The same model, whose graph gives the outputs of these layers, too. Raises OptionError if one is not there.

        Args:
            taps: numbers of layers (`passes.tap_features`); negative ones count from the end.
        """
        graph_module = _copy(self.graph_module, self.graph_module._get_name())
        manager = PassManager(self.fake_mode, active_observers(), [*self.records])
        manager.apply(graph_module, (passes.tapped(taps),))
        return replace(self, graph_module=graph_module, records=manager.records, taps=taps)

    def target(self, compile_model: Compile) -> Target:
        """The model as drafters meet it."""
        hidden = results(self.graph_module.graph)[0].meta["val"]
        layers = sum(node.target == ragged_attention for node in self.graph_module.graph.nodes)
        sizes = (self.batch.rows, self.batch.capacity, self.vocabulary, hidden.shape[-1], layers)
        tables = GraphTables(self.graph_module)
        return Target(*sizes, hidden.dtype, hidden.device, compile_model, self.with_layers, tables)

    def with_layers(self, layers: tuple[int, ...]) -> CompiledModel:
        """The model with these of its decoder layers only; weights and the names of caches are the same.

        Raises:
            UnsupportedModelError: it cannot be told what the layers are.
            OptionError: there are no such layers.
        """
        graph_module, manager = _copy(self.graph_module, "Thinned"), PassManager(self.fake_mode, active_observers())
        manager.apply(graph_module, (passes.thinned(layers),))
        shapes = {name: self.cache_shapes[name] for name in caches(graph_module.graph)}
        return replace(self, graph_module=graph_module, cache_shapes=shapes, records=manager.records, taps=())

    def named(self) -> fx.GraphModule:
        """The graph with results by name, `hidden` `[T, H]` and `logits` `[R, V]`: it verifies, and does no more."""
        graph_module = _copy(self.graph_module, "Verify")
        result = output(graph_module.graph)
        hidden, logits, *_ = results(graph_module.graph)
        result.args = ({"hidden": hidden, "logits": logits},)
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        return graph_module

    def __call__(
        self, packed: Packed, lengths: Tensor, logit_index: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[T, H]` and logits `[R, V]`; writes the KV of the packed tokens into `caches`."""
        hidden, logits, _ = self.with_taps(packed, lengths, logit_index, caches)
        return hidden, logits

    def with_taps(
        self, packed: Packed, lengths: Tensor, logit_index: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """The same, and the outputs `[T, H]` of the layers in `taps`, by the numbers they were asked for."""
        if packed.ancestors is None and self.batch.tree_nodes:
            packed = as_trees(packed, lengths, self.ancestor_words)
        given = {**caches, **named(packed), "lengths": lengths, "logit_index": logit_index}
        hidden, logits, *tapped = self.graph_module(
            *(given[str(node.target)] for node in inputs(self.graph_module.graph))
        )
        # some of its layers alone may still give what was tapped of the whole
        return hidden, logits, dict(zip(self.taps, tapped, strict=False))


def compile_model(model: nn.Module, batch: BatchShape, taps: tuple[int, ...] = ()) -> CompiledModel:
    """Capture `model` and rewrite it to level L2.

    Args:
        model: in eval mode.
        batch: rows, and tokens that each can hold.
        taps: layers whose outputs are wanted, too (`passes.tap_features`); negative indices count from the end.

    Raises:
        InvalidInputError: the model is in training mode or its weights are unusable.
        UnsupportedModelError: the model cannot be captured, or a pass cannot prove its rewrite right.
        OptionError: a layer of `taps` does not exist.
    """
    return rewrite(capture(model, batch.capacity), batch, taps)


def rewrite(
    graph_module: fx.GraphModule, batch: BatchShape, taps: tuple[int, ...] = (), records: Iterable[PassRecord] = ()
) -> CompiledModel:
    """Rewrite a captured graph to level L2.

    Args:
        graph_module: level L0; it is rewritten in place.
        batch, taps: as for `compile_model`.
        records: of what was done before.

    Raises:
        UnsupportedModelError, OptionError: as `compile_model`.
    """
    keep_values(graph_module.graph)
    ids = placeholder(graph_module.graph, "input_ids").meta["val"]
    fake_mode: FakeTensorMode = ids.fake_mode
    has_kernels = load_kernels(ids.device.type)  # before anything runs: the comparison with the model uses them, too
    _check_capacity(batch.capacity, ids.shape[1])
    tensors = dict(chain(graph_module.named_parameters(remove_duplicate=False), graph_module.named_buffers()))
    manager = PassManager(fake_mode, active_observers(), [*records])
    manager.apply(graph_module, (passes.captured(), passes.canonical(batch), passes.unpadded(batch, fake_mode)))
    looked_at = {name: tensors[name] for name in sorted(read_attributes(graph_module)) if name in tensors}
    if not has_kernels and ids.device.type in ("cpu", "cuda"):
        note = f"ops on {ids.device.type}: {kernel_status(ids.device.type)}"
        manager.records[0] = replace(manager.records[0], notes=(*manager.records[0].notes, note))
    passes.drop_unused_weights(graph_module)
    specs = {
        name: TensorSpec(tuple(value.shape), value.dtype, kept="forever", in_place=True)
        for name, value in caches(graph_module.graph).items()
    }
    vocabulary = int(results(graph_module.graph)[1].meta["val"].shape[-1])
    compiled = CompiledModel(graph_module, batch, fake_mode, vocabulary, specs, manager.records, looked_at)
    return compiled.tapped(taps) if taps else compiled


def _check_capacity(capacity: int, tokens: torch.SymInt) -> None:
    """A table or a branch of the forward may end at some number of tokens; the graph is right up to there only."""
    most = tokens.node.shape_env.bound_sympy(tokens.node.expr).upper
    if capacity > most:
        raise UnsupportedModelError(
            f"max_length={capacity}, but the forward has a table or a branch on the length that ends at {most} tokens",
            remedy=f"pass max_length={most} or less",
            longest=int(most),
        )


@dataclass(frozen=True)
class CompiledStep:
    """Level L3: the whole decoding step of a compiled model as one graph with named inputs and results.

    Attributes:
        graph_module: the step.
        compiled: the model that it decodes with.
        rule: what accepts drafts.
        drafter: what proposes them.
        policy: what chooses how many are verified.
        processors: what may be done to the logits.
        probes: what may look at what was decided.
        used: the options that requests may set; what only others need is not in the graph.
        readings: what the probes in the graph tell, by the names of results.
        records: what each pass did, those of the model included.
        drafts_for_few: whether it drafts for as many of its rows as the host says (`FuseStep`).
    """

    graph_module: fx.GraphModule
    compiled: CompiledModel
    rule: Rule
    drafter: Drafter
    policy: LengthPolicy
    processors: tuple[LogitsProcessor, ...]
    probes: tuple[Probe, ...]
    used: frozenset[str]
    readings: dict[str, ReadingSpec]
    records: list[PassRecord]
    drafts_for_few: bool = False

    def drafting_by(self, drafter: Drafter) -> CompiledStep:
        """The same step with another drafter, of the same shape, in the place of its own."""
        parts = self.rule, drafter, self.policy, self.processors, self.probes
        return compile_step(self.compiled, *parts, used=self.used, drafts_for_few=self.drafts_for_few)

    def without_drafts(self, drafter: Drafter, policy: LengthPolicy) -> CompiledStep | None:
        """A step that verifies and drafts nothing, to be run between steps of this one, on their state.

        None where a part that is in both keeps a tensor whose shape goes with the number of drafts, or needs drafts.

        Args:
            drafter, policy: what stands in the places of the step's own; the drafter drafts nothing.
        """
        sizes = [sizes_of(self.compiled.batch, self.compiled.vocabulary, self.rule, d) for d in (self.drafter, drafter)]
        shared = self.rule, *self.processors, *self.probes
        if any(part.tensors(sizes[0]) != part.tensors(sizes[1]) for part in shared):
            return None
        parts = self.rule, drafter, policy, self.processors, self.probes
        try:
            return compile_step(self.compiled, *parts, used=self.used, beside=self.drafter)
        except PartError:
            return None

    def suited(
        self, used: Collection[str], *, shows_logits: bool = False, drafts_for_few: bool | None = None
    ) -> CompiledStep:
        """The form for requests that set these options of parts.

        Args:
            used: the options.
            shows_logits: whether it is to be cut in two.
            drafts_for_few: as in `compile_step`; None as here.
        """
        few = self.drafts_for_few if drafts_for_few is None else drafts_for_few
        parts = (self.rule, self.drafter, self.policy, self.processors, self.probes)
        return compile_step(self.compiled, *parts, used=used, shows_logits=shows_logits, drafts_for_few=few)

    def pageable(self) -> list[str]:
        """The names of the KV caches that can be blocks of a pool."""
        return [str(node.target) for node in pageable(self.graph_module.graph)]

    def reaches(self) -> dict[str, int]:
        """How many tokens are seen of the target's KV caches whose attention sees no further, by their names."""
        return {name: seen for name, seen in reaches(self.graph_module.graph).items() if not name.startswith(DRAFTER)}

    def packed(self) -> CompiledStep:
        """The same step with its target's keys and values in 8 bits, in slabs."""
        return self._with(PackCaches(self.compiled.fake_mode))

    def placed(self, rings: Rings | None = None, paging: Paging | None = None) -> CompiledStep:
        """The same step on rings and on a pool of blocks; without either it keeps its slabs."""
        fake_mode = self.compiled.fake_mode
        ring = (RingCaches(rings, fake_mode),) if rings else ()
        page = (PageCaches(paging, fake_mode),) if paging else ()
        return self._with(*ring, *page)

    def _with(self, *kinds: Pass) -> CompiledStep:
        """The same step with caches in other kinds of memory."""
        if not kinds:
            return self
        graph_module = _copy(self.graph_module, "Step")
        manager = PassManager(self.compiled.fake_mode, active_observers(), [*self.records])
        manager.apply(graph_module, (passes.placed(kinds),))
        return replace(self, graph_module=graph_module, records=manager.records)

    def halves(self) -> Halves:
        """The step, which shows its logits, as two graphs."""
        return split_halves(self.graph_module)

    def for_target(
        self, target: tuple[Pass, ...], records: list[PassRecord], graph_module: fx.GraphModule | None = None
    ) -> fx.GraphModule:
        """A copy of the step, or of a half of it, in the form that a target's passes give it; `records` gets theirs."""
        return apply_target_passes(graph_module or self.graph_module, self.compiled, target, records)

    def signature(self, graph: fx.Graph) -> Signature:
        """The bindings of a graph that was made of the step."""
        return Signature.of(graph, self.roles, self.options, self.readings)

    @property
    def parts(self) -> dict[str, Part]:
        """All parts, by what the names of their inputs begin with; what is not in the graph, too."""
        numbered = {"processor": self.processors, "probe": self.probes}
        several = {f"{kind}_{n}": part for kind, parts in numbered.items() for n, part in enumerate(parts)}
        return {"rule": self.rule, "drafter": self.drafter, "policy": self.policy, **several}

    @property
    def options(self) -> dict[str, RowOption]:
        """What requests may set, by the names of the inputs."""
        return {str(n.target): n.meta["option"] for n in inputs(self.graph_module.graph) if "option" in n.meta}

    @property
    def roles(self) -> dict[str, str]:
        """Roles of the step's inputs (`signature.ROLES`)."""
        return {str(node.target): node.meta["role"] for node in inputs(self.graph_module.graph)}


def compile_step(
    compiled: CompiledModel,
    rule: Rule,
    drafter: Drafter,
    policy: LengthPolicy,
    processors: tuple[LogitsProcessor, ...] = (),
    probes: tuple[Probe, ...] = (),
    *,
    used: Collection[str] = (),
    beside: Drafter | None = None,
    shows_logits: bool = False,
    drafts_for_few: bool = False,
) -> CompiledStep:
    """Fuse packing, the model, what is done to its logits, acceptance and the next drafts into one step.

    Args:
        compiled: the model.
        rule, drafter, policy, processors, probes: the parts.
        used: the options of parts that requests may set to something other than their defaults.
        beside: the drafter of the steps between which this one is to run, on their state (`FuseStep`).
        shows_logits: whether the step is to be cut in two.
        drafts_for_few: whether it drafts for as many of its rows as the host says (`FuseStep`).
    """
    graph_module = _copy(compiled.graph_module, "Step")
    manager = PassManager(compiled.fake_mode, active_observers(), [*compiled.records])
    parts = (rule.suited(used), drafter.suited(used), policy.suited(used))
    applied = in_use(processors, used), in_use(probes, used)
    fuse = FuseStep(
        compiled.batch,
        *parts,
        compiled.fake_mode,
        *applied,
        beside=beside,
        shows_logits=shows_logits,
        drafts_for_few=drafts_for_few,
    )
    manager.apply(graph_module, (passes.step(fuse),))
    return CompiledStep(
        graph_module,
        compiled,
        rule,
        drafter,
        policy,
        processors,
        probes,
        frozenset(used),
        fuse.readings,
        manager.records,
        drafts_for_few,
    )


def apply_target_passes(
    graph_module: fx.GraphModule, compiled: CompiledModel, target: tuple[Pass, ...], records: list[PassRecord]
) -> fx.GraphModule:
    """A copy of a graph of `compiled` in the form that a target's passes give it; what they did goes to `records`."""
    suited = _copy(graph_module, graph_module._get_name())
    manager = PassManager(compiled.fake_mode, active_observers(), records)
    return manager.apply(suited, (passes.targeted(target),))


def _copy(source: fx.GraphModule, name: str) -> fx.GraphModule:
    """The same graph anew; weights are shared. Its code is written when it is first called: most are never."""
    return _LazyGraphModule(source, copied(source.graph), class_name=name)


__all__ = ["CompiledModel", "CompiledStep", "apply_target_passes", "compile_model", "compile_step", "rewrite"]
