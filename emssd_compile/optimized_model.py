"""`optimize(model)`: where capture, passes, lowering and runtime meet."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from emssd_compile import keywords
from emssd_compile.acceptance import check_fit, make_rule
from emssd_compile.ambient import compiling, neutral
from emssd_compile.capture import check_model, check_weights
from emssd_compile.decoder import Decoder
from emssd_compile.drafters import make_drafter, without
from emssd_compile.ends import all_are_ours
from emssd_compile.errors import (
    OptionError,
    PartError,
    ProbeError,
    ProcessorError,
    StaleModelError,
    UnsupportedModelError,
)
from emssd_compile.freshness import Freshness, fingerprints
from emssd_compile.generation import honoured_options
from emssd_compile.layouts import LAYOUTS
from emssd_compile.length import declared_sizes, length_limit, resolve_length
from emssd_compile.logits import LogitsProcessor, make_processors
from emssd_compile.lowering import BACKENDS, StepFunction
from emssd_compile.options import CompileOptions
from emssd_compile.prefix_cache import PrefixCache
from emssd_compile.probes import make_probes
from emssd_compile.progress import progress_bar
from emssd_compile.report import Explanation
from emssd_compile.runtime.assembly import assemble, make_variant, switch
from emssd_compile.runtime.buckets import decode_buckets
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.launch import Variant
from emssd_compile.runtime.memory import check_state, describe, plan_pool, plan_rings
from emssd_compile.step.acceptance import Rule
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import Drafter, tree_nodes
from emssd_compile.step.logits import LogitContext
from emssd_compile.step.options import RowOption
from emssd_compile.step.paging import DRAFTER, Paging, own_reading, sharing_of
from emssd_compile.step.parts import Part, merge_options
from emssd_compile.step.probe import READING, Probe, ReadingSpec, check_readings, merge_readings
from emssd_compile.step.rings import Rings
from emssd_compile.structure import Structure

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledModel, CompiledStep
    from emssd_compile.lowering.halves import HalvedStep, LogitsHook
    from emssd_compile.passes import PassRecord


_HELD = ("row", "memory", "host", "option", "state", "setting")
"""Roles of what is allocated beside keys and values."""


def optimize(
    model: nn.Module,
    drafter: str | nn.Module = "prompt-lookup",
    *,
    max_batch: int = 8,
    max_length: int | None = None,
    backend: str = "inductor",
    layout: str = "auto",
    acceptance: str | Rule = "auto",
    prefill_chunk: int | None = None,
    deterministic: bool = False,
    processors: Sequence[LogitsProcessor] = (),
    probes: Sequence[Probe] = (),
    memory: str = "auto",
    kv_tokens: int | None = None,
    prefix_cache: bool = False,
) -> OptimizedModel:
    """Compile a causal language model into a fused draft-and-verify step over unpadded batches.

    The tokens that `generate` gives are the model's own: in fp32 exactly those of its greedy decoding of each prompt
    alone. Weights are shared with `model`, which is left as it was: what is written into them is seen by the next
    `generate`, and what cannot be followed is refused there (see `OptimizedModel.refresh`). Only Inductor on a CPU
    holds the matrices a second time, in the layout that it multiplies fastest, unless that takes more than half of the
    memory available (`explain()` says so then).

    Args:
        model: a Hugging Face causal LM, or any module whose forward maps `ids[1, T]` to logits (a tensor, a tuple
            whose first item is logits, or an object with `.logits`). In eval mode.
        drafter: `"none"`, `"prompt-lookup"`, `"suffix"`, a `Drafter` (`docs/drafters.md`), or a smaller causal LM
            (classic two-model speculation).
        max_batch: rows decoded together; further prompts are queued.
        max_length: tokens a row can hold, prompt and output together. Default: the model's limit.
        backend: `"inductor"` (compiled at first use or by `warmup()`) or `"eager"`.
        layout: `"auto"`: each step verifies the drafts that, by measured times and acceptance, make tokens come faster,
            and none where plain decoding is faster. `"packed"`: all drafts, without padding. `"padded"`: K + 1 tokens
            for each row, used or not. The tokens that come out never differ.
        acceptance: `"auto"` (`"match"`: the tokens of decoding without drafts), a rule's name (`docs/rules.md` has them
            all), or a lossless `Rule`. A rule that changes what the model says is taken by name only.
        prefill_chunk: most packed tokens of a step: at least `max_batch` x (drafts + 1). Default: 512, or that.
        deterministic: choose the sizes of steps without a clock: from assumed times where `layout` measures, and always
            from the same start. Then a call with the same prompts and options gives the same bits in half precision,
            too, on the same machine with the same number of threads, whatever was decoded before.
        processors: logits processors of your own, applied behind those of the package.
        probes: probes of your own, which tell of each token what `generate` then returns.
        memory: where keys and values are. `"slab"`: memory for `max_length` tokens in each row. `"paged"`: rows share a
            pool of blocks, and take of it what they come to hold; a request waits until there are enough for all that
            it may become, and sequences of one prompt have its blocks in common. `"auto"`: layers that see no further
            than a window keep that and `prefill_chunk` tokens of each row, if that is less (on a GPU, if slabs do not
            fit); the others have slabs if they fit into the memory available, else a pool. The tokens that come out
            never differ, and `explain().memory` says what is where.
        kv_tokens: how many tokens the pool holds, over all rows; asks for one. Default: half of the memory available.
        prefix_cache: keep what has been read in the pool, for requests to come that begin in the same way, until its
            room is needed or the weights change; asks for one. See `OptimizedModel.prefix_cache`. Default: prompts of
            one call share what is read of beginnings that they have in common, and nothing is left of them: what
            another caller has sent could else be told from the time that a prompt takes.

    Raises:
        InvalidInputError: the model is in training mode or its weights are unusable.
        OptionError: an option is unknown or out of range.
        UnsupportedModelError: the model cannot be compiled to give exactly its own tokens; says where and why.
        DrafterError: the drafter does not fit the model, or breaks its contract.
        RuleError, PolicyError, ProcessorError, ProbeError: the acceptance rule, the length policy, a logits processor
            or a probe breaks its contract.
        CapacityError: the KV caches, or what a part keeps, do not fit into memory.
        BackendError: the backend lacks something here: a C++ compiler, or a folder for what it compiles.
    """
    check_model(model)
    rule, proposer = make_rule(acceptance), make_drafter(drafter)
    others = make_processors(processors), make_probes(probes)
    check_fit(rule, proposer)
    length = resolve_length(model, max_length)
    options = CompileOptions(
        max_batch, length, backend, layout, prefill_chunk, deterministic, memory, kv_tokens, prefix_cache
    )
    options.chunk(proposer.num_draft_tokens)
    options.check_pool(tree_nodes(proposer))
    check_state(options.max_batch, options.max_length, _device(model))
    BACKENDS[options.backend].require(_device(model))
    if (sizes := declared_sizes(model, max_batch, length)) is not None:
        proposer.check(sizes)
    check_weights(model)
    check_weights(proposer)
    with compiling, neutral(torch.get_default_dtype()):
        step, captured = _compile(model, rule, proposer, options, *others)
        return OptimizedModel(model, step, options, captured)


def _compile(
    model: nn.Module,
    rule: Rule,
    drafter: Drafter,
    options: CompileOptions,
    processors: tuple[LogitsProcessor, ...],
    probes: tuple[Probe, ...],
) -> tuple[CompiledStep, tuple[CompiledModel, ...]]:
    """The step, and the models that were captured for it."""
    from emssd_compile.compiler import compile_model, compile_step  # brings sympy: not needed to import us
    from emssd_compile.selfcheck import check_against

    batch = BatchShape(options.max_batch, options.max_length, tree_nodes(drafter))
    captured: list[CompiledModel] = []

    def checked(source: nn.Module, compiled: CompiledModel) -> CompiledModel:
        check_against(source, compiled)
        captured.append(compiled)
        return compiled

    def compile_draft_model(source: nn.Module, *, tree_nodes: int = 0) -> CompiledModel:
        check_model(source)
        if all(source is not held for held in drafter.modules()):  # what it holds is checked with it
            check_weights(source)
        most = min(batch.capacity, length_limit(source) or batch.capacity)
        return checked(source, _compile_as_far(source, BatchShape(batch.rows, most, tree_nodes)))

    compiled = checked(model, compile_model(model, batch, drafter.taps))

    def with_layers(layers: tuple[int, ...]) -> CompiledModel:
        captured.append(thinned := compiled.with_layers(layers))
        return thinned

    drafter.prepare(replace(compiled.target(compile_draft_model), with_layers=with_layers))
    policy = LAYOUTS[options.layout].policy()
    few = _device(model).type == "cpu"  # elsewhere steps are captured, for all rows
    step = compile_step(compiled, rule, drafter, policy, processors, probes, drafts_for_few=few)
    parts = (rule, drafter, policy, *processors)
    merge_options(parts, ProcessorError)
    _check_names(merge_options((*parts, *probes), ProbeError))
    sizes = step.signature(step.graph_module.graph).sizes
    merge_readings(check_readings(probe, probe.readings(sizes)) for probe in probes)
    return step, tuple(captured)


def _check_names(options: Collection[str]) -> None:
    """Raises PartError if `generate` takes something else by the name of an option."""
    taken = sorted({*options} & (keywords.NO_OPTIONS | inspect.signature(Decoder.generate).parameters.keys()))
    if taken:
        raise PartError(f"a part declares the option {taken[0]!r}, which `generate` knows as something else; rename it")


def _compile_as_far(model: nn.Module, batch: BatchShape) -> CompiledModel:
    """A draft model for rows of C tokens, or of fewer where it cannot be right for so many."""
    from emssd_compile.compiler import compile_model

    try:
        return compile_model(model, batch)
    except UnsupportedModelError as error:
        if error.longest is None or not 0 < error.longest < batch.capacity:
            raise
        shorter = replace(batch, capacity=error.longest)
    return _compile_as_far(model, shorter)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class _Form:
    """One form of the step.

    Attributes:
        variant: what runs.
        graphs: what holds weights: the graphs as the backend's passes left them, and as they were before.
        records: what each pass did.
        halves: the step, if it is run in two halves.
    """

    variant: Variant
    graphs: tuple[fx.GraphModule, ...]
    records: list[PassRecord]
    halves: HalvedStep | None = None


def _inputs(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]


class OptimizedModel(Decoder):
    """A compiled model. Made by `optimize`.

    Attributes:
        model: the user's model; its weights are shared.
        drafter: what proposes tokens.
        options: sizes and choices.
        stats: what decoding did since `stats.reset()`.
        graph_module: the step graph in the form that the backend runs.
        config, generation_config, device, dtype: those of the model.
    """

    _has_hooks = True

    def __init__(
        self,
        model: nn.Module,
        step: CompiledStep,
        options: CompileOptions,
        captured: tuple[CompiledModel, ...] = (),
    ) -> None:
        self.model = model
        self.drafter = step.drafter
        self.options = options
        self._paging: Paging | None = None
        self._rings: Rings | None = None
        self._fingerprints: tuple[int, ...] = ()  # of the weights that the cached prefixes were read with
        super().__init__(self._assemble(step, captured or (step.compiled,)), guarantee=step.rule.guarantees)

    def _assemble(self, step: CompiledStep, captured: tuple[CompiledModel, ...], *, again: bool = False) -> Engine:
        """Lower a step of the model as it is now, and remember what it is."""
        before = self._paging, self._rings
        try:
            # Slabs stay slabs: they take the memory that would be found missing.
            if self._rings is not None or not again:
                self._rings = self._plan_rings(step)
            if self._paging is not None or not again:
                self._paging = self._plan_pool(step.placed(self._rings))
            return self._assemble_on(step, captured)
        except BaseException:
            self._paging, self._rings = before
            raise

    def _assemble_on(self, step: CompiledStep, captured: tuple[CompiledModel, ...]) -> Engine:
        backend, device, rows = BACKENDS[self.options.backend], _device(self.model), self.options.max_batch
        form = self._lower(step)
        freshness = self._compare_from_now(captured, [form])
        drafts = step.drafter.num_draft_tokens
        engine = assemble(
            form.variant,
            device,
            LAYOUTS[self.options.layout],
            prefill_chunk=self.options.chunk(drafts),
            deterministic=self.options.deterministic,
            buckets=decode_buckets(rows, drafts, step.drafter.max_depth) if backend.is_captured else (),
            parts=step.parts,
            paging=self._paging,
            rings=self._rings,
        )
        # Last, so that an object that cannot be refreshed stays what it was.
        self._step, self._captured, self._freshness = step, captured, freshness
        self._records, self.graph_module = form.records, form.graphs[0]
        self._forms = {(step.used, False): form}
        return engine

    def _plan_rings(self, step: CompiledStep) -> Rings | None:
        """The caches that keep a window; None if none does, as where all is asked to be in slabs or in a pool."""
        options, signature = self.options, step.signature(step.graph_module.graph)
        if options.memory != "auto" or options.asks_for_pool:
            return None
        return plan_rings(
            step.reaches(),
            signature.specs("cache"),
            signature.specs(*_HELD),
            _device(self.model),
            num_new=options.chunk(step.drafter.num_draft_tokens),
            is_asked_for=self._rings is not None,
        )

    def _plan_pool(self, step: CompiledStep) -> Paging | None:
        """The pool that keys and values are in, but for rings; None if each row has a slab."""
        options = self.options
        if options.memory == "slab":
            return None
        signature, drafter = step.signature(step.graph_module.graph), step.drafter
        held = signature.specs("cache", "ring", *_HELD)
        # A drafter that reads by itself would write to blocks that are shared: it reads into slabs.
        stays = options.prefix_cache and own_reading(drafter)
        slabs = {name: held.pop(name) for name in step.pageable() if not (stays and name.startswith(DRAFTER))}
        stay = [name for name in signature.with_role("cache") if name not in slabs]
        keeps, has_rings = options.prefix_cache, self._rings is not None
        sharing = sharing_of(drafter, signature.sizes.depth, slabs, stay, keeps=keeps, has_rings=has_rings)
        if options.prefix_cache and sharing.why_not:
            raise OptionError(f"prefix_cache=True: {sharing.why_not}; leave it out, or use another drafter")
        if self._paging is not None:  # as large as it is, for the same reason
            return replace(self._paging, caches=(*slabs,), sharing=sharing)
        return plan_pool(
            slabs,
            held,
            options.max_length,
            _device(self.model),
            kv_tokens=options.kv_tokens,
            is_asked_for=options.asks_for_pool,
            sharing=sharing,
        )

    def _in_memory(self, step: CompiledStep) -> CompiledStep:
        """The step as it finds keys and values where they are."""
        return step.placed(self._rings, self._paging)

    def _lower(self, slabs: CompiledStep) -> _Form:
        """A step in the form that the backend runs."""
        step = self._in_memory(slabs)
        records = [*step.records]
        graph_module, function = self._lower_graph(step, step.graph_module, records)
        deterministic, plain = self.options.deterministic, None
        can_be_left_out = step.drafter.is_costly and not step.drafter.must_run
        if can_be_left_out and LAYOUTS[self.options.layout].is_measured and not deterministic:
            undrafted = slabs.without_drafts(without(step.drafter), LAYOUTS["packed"].policy())
            plain = self._lower(undrafted) if undrafted else None
        variant = make_variant(
            function,
            step.signature(graph_module.graph),
            deterministic=deterministic,
            plain=plain.variant if plain else None,
        )
        graphs = (graph_module, step.graph_module, slabs.graph_module, *(plain.graphs if plain else ()))
        return _Form(variant, tuple(dict.fromkeys(graphs)), records)

    def _lower_halves(self, slabs: CompiledStep) -> _Form:
        """A step that shows its logits, in two parts."""
        from emssd_compile.lowering.halves import HalvedStep  # brings sympy: not needed to import us

        step = self._in_memory(slabs)
        records, signature = [*step.records], step.signature(step.graph_module.graph)
        halves = step.halves()
        (forward, run), (decide, finish) = (
            self._lower_graph(step, half, records) for half in (halves.forward, halves.decide)
        )
        function = HalvedStep(
            [binding.name for binding in signature.inputs],
            (run, _inputs(halves.forward)),
            (finish, _inputs(halves.decide)),
            LogitContext.form(signature.sizes),
        )
        variant = make_variant(function, signature, deterministic=self.options.deterministic, is_capturable=False)
        return _Form(variant, (forward, decide, step.graph_module), records, function)

    def _lower_graph(
        self, step: CompiledStep, graph_module: fx.GraphModule, records: list[PassRecord]
    ) -> tuple[fx.GraphModule, StepFunction]:
        backend = BACKENDS[self.options.backend]
        suited = step.for_target(backend.passes(_device(self.model)), records, graph_module)
        return suited, backend.lower(suited, self.options.deterministic)

    def _compare_from_now(self, captured: tuple[CompiledModel, ...], forms: Collection[_Form]) -> Freshness:
        """What later changes of the model are compared with: what it is now."""
        graphs = (*(g for form in forms for g in form.graphs), *(c.graph_module for c in captured))
        looked_at = [tensor for c in captured for tensor in c.looked_at.values()]
        return Freshness(Structure(self.model, self.drafter), graphs, looked_at)

    def _select(self, used: Collection[str], *, hooked: bool) -> None:
        key = (self._served_with(used), hooked)
        if key not in self._forms:
            with compiling:
                step = self._step.suited(key[0], shows_logits=key[1])
                form = self._lower_halves(step) if key[1] else self._lower(step)
                self._freshness = self._compare_from_now(self._captured, [*self._forms.values(), form])
            self._forms[key] = form
        if self._engine.variant is not self._forms[key].variant:
            switch(self._engine, self._forms[key].variant)
        self._halves = self._forms[key].halves

    @contextlib.contextmanager
    def _calling(self, hooks: tuple[LogitsHook, ...]) -> Iterator[None]:
        halves = self._halves
        if halves is None:
            yield
            return
        halves.hooks = hooks
        try:
            yield
        finally:
            halves.hooks = ()

    @property
    def _parts(self) -> tuple[Part, ...]:
        step = self._step
        return (step.rule, step.drafter, step.policy, *step.processors, *step.probes)

    @property
    def _is_ours(self) -> bool:
        return all_are_ours(self._step.processors)

    @property
    def _assisted(self) -> dict[str, object]:
        return self.drafter.assisted()

    def _served_with(self, used: Collection[str]) -> frozenset[str]:
        """These options, and the others of the parts that they belong to: which of them are set needs no other form."""
        options = [part.options().keys() for part in self._parts]
        return frozenset(name for own in options if not own.isdisjoint(used) for name in own)

    @property
    def row_options(self) -> dict[str, RowOption]:
        """What each request may set for the parts of the step, by the keyword of `generate`."""
        every = merge_options(self._parts, PartError)
        return {name: option for name, option in every.items() if option.needs in ("", *every)}

    @property
    def readings(self) -> dict[str, ReadingSpec]:
        """What probes may tell of each token, by the names of results."""
        sizes = self._engine.variant.signature.sizes
        told = merge_readings(probe.readings(sizes) for probe in self._step.probes)
        return {f"{READING}{name}": spec for name, spec in told.items()}

    def _follow(self) -> None:
        if self._freshness.follow():
            self._engine.launcher.forget_captures()
        if self.options.prefix_cache:
            found = fingerprints((*(c.graph_module for c in self._captured), self.drafter))
            if found != self._fingerprints:
                self._engine.memory.forget()
            self._fingerprints = found

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """What is kept of texts that have been read; None without `optimize(prefix_cache=True)`."""
        return PrefixCache(self) if self.options.prefix_cache else None

    @property
    def _keeps_prefixes(self) -> bool:
        return self.options.prefix_cache

    def refresh(self) -> None:
        """Make the compiled step that of the model as it is now.

        Each `generate` follows by itself what is written into weights, in any way, and other tensors of the same shape
        and dtype in their place. Other changes of the modules and what hangs on them (adapters that are switched or
        merged, hooks, another dtype or device, replaced modules, attributes, the configuration) make it raise
        StaleModelError: this method then compiles the model anew. Where nothing of that kind has changed, it costs no
        more than the comparison. The options stay those of `optimize`. What a forward reads from elsewhere, such as a
        global variable of its file, is not compared: call `optimize` again after changing that.

        Raises:
            InvalidInputError, UnsupportedModelError, DrafterError, CapacityError: as `optimize`. What was compiled
                before is kept, and remains stale.
            ReentryError: it was called from inside a `generate` of this object.
            SessionError: a session of this object is open.
        """
        with self._turns.take("refresh"), compiling, neutral(self._default_dtype):
            check_model(self.model)
            try:
                self._follow()
            except StaleModelError:
                check_weights(self.model)
                check_weights(self._step.drafter)
                step = self._step
                parts = step.rule, step.drafter, self.options, step.processors, step.probes
                self._take(self._assemble(*_compile(self.model, *parts), again=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward gives."""
        return self.model(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's parameters."""
        return self.model.parameters(recurse)

    @property
    def name_or_path(self) -> Any:
        """Where the model comes from, if it knows."""
        return getattr(self.model, "name_or_path", "")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model (not what was compiled of it: `export_onnx` and its like do that)."""
        if not hasattr(self.model, "save_pretrained"):
            raise OptionError(f"{type(self.model).__name__} has no save_pretrained; save its state_dict() with torch")
        save: Any = self.model.save_pretrained
        return save(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The model's configuration, if it has one."""
        return getattr(self.model, "config", None)

    @property
    def generation_config(self) -> Any:
        """The model's generation defaults, if it has any."""
        return getattr(self.model, "generation_config", None)

    @property
    def _prepare_generation_config(self) -> Any:
        """The model's own, if it has one: `transformers.pipeline` merges its defaults with it."""
        return self.model._prepare_generation_config

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights."""
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    def explain(self) -> Explanation:
        """What each pass did and refused, and which ops the step holds; prints as tables."""
        memory = describe(self._engine.variant.signature, self._paging, self._rings)
        return Explanation.of(self._records, self.graph_module, memory)

    def export_onnx(
        self,
        folder: str | Path,
        *,
        opset_version: int = 24,
        row_options: Collection[str] | None = None,
        verify_only: bool = False,
        check: bool = True,
        tokenizer: Any = None,
        progress: bool = False,
    ) -> None:
        """Write the step as an ONNX model of standard operators, with all that `emssd_compile.load` needs.

        Args:
            folder: the artifact; must not exist, or be empty.
            opset_version: of ONNX; 24 is the first with attention over a KV cache.
            row_options: those of `self.row_options` that requests to the artifact may set, and with them those without
                which they have no effect. What nobody may ask for is not in the artifact, and takes no time there.
                Default: `min_new_tokens` and what the model's `generation_config` asks for.
            verify_only: the model on packed rows alone, for a loop of your own (`emssd_compile.export.open_graph`).
            check: decode a few prompts with the artifact before it is finished, and compare; in float32 only.
            tokenizer: of transformers, to lie in the artifact, too (`emssd_compile.export.load_tokenizer`).
            progress: show a progress bar.

        Raises:
            OptionError: an option is out of range.
            UnsupportedModelError: an op of the model cannot be expressed; says which, and where it comes from.
            ArtifactError: onnx is not installed, or for the check onnxruntime; the folder cannot be written; or the
                check fails. Nothing is left behind.
            CapacityError: the check needs another set of KV caches, and they do not fit into memory.
        """
        self._export("onnx", folder, verify_only, check, progress, row_options, tokenizer, opset_version=opset_version)

    def export_aot(
        self,
        folder: str | Path,
        *,
        row_options: Collection[str] | None = None,
        verify_only: bool = False,
        check: bool = True,
        tokenizer: Any = None,
        progress: bool = False,
    ) -> None:
        """Write the step as machine code (an AOTInductor package), with all that `emssd_compile.load` needs.

        Args and errors are those of `export_onnx`.
        """
        self._export("aot", folder, verify_only, check, progress, row_options, tokenizer)

    def export_tensorrt(
        self,
        folder: str | Path,
        *,
        row_options: Collection[str] | None = None,
        verify_only: bool = False,
        check: bool = True,
        tokenizer: Any = None,
        progress: bool = False,
        **options: Any,
    ) -> None:
        """Build a TensorRT engine of the step, with all that `emssd_compile.load` needs.

        Args:
            folder: the artifact; must not exist, or be empty.
            row_options, verify_only, check, tokenizer, progress: as in `export_onnx`; the check needs a GPU.
            **options: the attributes of `emssd_compile.export.tensorrt.BuildOptions`: `compute_capabilities` (GPUs to
                build for, as in `["8.9"]`; default: the one that is here), `attention`, `weights`, ...

        Raises:
            OptionError: an option is unknown or out of range, or the runtime cannot do it.
            UnsupportedModelError: TensorRT has nothing that does what an op does; says which, and where it comes from.
            ArtifactError: no TensorRT is installed, or it fails to build; says what it said. Nothing is left behind.
        """
        self._export("tensorrt", folder, verify_only, check, progress, row_options, tokenizer, **options)

    def _export(
        self,
        target: str,
        folder: str | Path,
        verify_only: bool,
        check: bool,
        progress: bool,
        row_options: Collection[str] | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        from emssd_compile.exporting import STAGES, Exportable, export

        honoured = honoured_options(self.row_options, row_options, self.generation_config, self._vocabulary)
        with self._turns.take("export"):
            self._follow()  # what is written is the model as it is now
            # a format of few inputs for whoever drives the step: it drafts for all rows
            step = self._step.suited(self._served_with(honoured), drafts_for_few=False)
        what = Exportable(step, self.options, self._engine.chunk, self.device, self.dtype, self.generation_config)
        with compiling, progress_bar(progress, len(STAGES), f"exporting to {target}") as advance:
            chosen: dict[str, Any] = {"verify_only": verify_only, "check": check, "tokenizer": tokenizer, **options}
            export(what, target, Path(folder), advance=advance, **chosen)
