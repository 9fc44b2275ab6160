"""`optimize(model)`: where capture, passes, lowering and runtime meet."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from emssd_compile.acceptance import check_fit, make_rule
from emssd_compile.ambient import compiling, neutral
from emssd_compile.capture import check_model, check_weights, device_of
from emssd_compile.decoder import Decoder
from emssd_compile.drafters import make_drafter
from emssd_compile.ends import all_are_ours
from emssd_compile.errors import (
    OptionError,
    PartError,
    StaleModelError,
)
from emssd_compile.forms import Form, Forms
from emssd_compile.freshness import Freshness, fingerprints
from emssd_compile.generation import honoured_options
from emssd_compile.layouts import LAYOUTS
from emssd_compile.length import declared_sizes, resolve_length
from emssd_compile.logits import LogitsProcessor, make_processors
from emssd_compile.lowering import BACKENDS
from emssd_compile.options import CompileOptions
from emssd_compile.placement import place
from emssd_compile.prefix_cache import PrefixCache
from emssd_compile.probes import make_probes
from emssd_compile.progress import progress_bar
from emssd_compile.report import Explanation
from emssd_compile.runtime.assembly import assemble, switch
from emssd_compile.runtime.buckets import decode_buckets
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.memory import check_state, describe
from emssd_compile.step.acceptance import Rule
from emssd_compile.step.drafting import tree_nodes
from emssd_compile.step.options import RowOption
from emssd_compile.step.parts import Part, merge_options
from emssd_compile.step.probe import READING, Probe, ReadingSpec, merge_readings
from emssd_compile.structure import Structure

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledModel, CompiledStep
    from emssd_compile.lowering.halves import LogitsHook


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
    kv_dtype: str | None = None,
) -> OptimizedModel:
    """Compile a causal language model into a fused draft-and-verify step over unpadded batches.

    The tokens that `generate` gives are the model's own: in fp32 exactly those of its greedy decoding of each prompt
    alone. Weights are shared with `model`, which is left as it was: what is written into them is seen by the next
    `generate`, and what cannot be followed is refused there (see `OptimizedModel.refresh`).

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
        kv_dtype: `"int8"`: keep the keys and values of the target in 8 bits, each vector with a scale of its own, in a
            quarter of the memory of float32, or half of that of bfloat16. This is lossy: the tokens are those of
            decoding without drafts with such keys and values, not the model's own, and `stats.guarantee` says so.
            Artifacts cannot have it.

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
        max_batch, length, backend, layout, prefill_chunk, deterministic, memory, kv_tokens, prefix_cache, kv_dtype
    )
    options.chunk(proposer.num_draft_tokens)
    options.check_pool(tree_nodes(proposer))
    check_state(options.max_batch, options.max_length, device_of(model))
    BACKENDS[options.backend].require(device_of(model))
    if (sizes := declared_sizes(model, max_batch, length)) is not None:
        proposer.check(sizes)
    check_weights(model)
    check_weights(proposer)
    with compiling, neutral(torch.get_default_dtype()):
        from emssd_compile.pipeline import compile_checked  # brings sympy: not needed to import us

        step, captured = compile_checked(model, rule, proposer, options, *others)
        return OptimizedModel(model, step, options, captured)


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
    _make: Forms

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
        self._fingerprints: tuple[int, ...] = ()  # of the weights that the cached prefixes were read with
        super().__init__(
            self._assemble(step, captured or (step.compiled,)),
            guarantee="lossy" if options.kv_dtype else step.rule.guarantees,
        )

    def _assemble(self, step: CompiledStep, captured: tuple[CompiledModel, ...], *, again: bool = False) -> Engine:
        """Lower a step of the model as it is now, and remember what it is."""
        device, layout = device_of(self.model), LAYOUTS[self.options.layout]
        placement = place(step, self.options, device, self._make.placement if again else None)
        forms = Forms(self.options, device, placement)
        form = forms.whole(step)
        freshness = self._compare_from_now(captured, [form])
        is_captured = BACKENDS[self.options.backend].is_captured
        drafts, depth = step.drafter.num_draft_tokens, step.drafter.max_depth
        engine = assemble(
            form.variant,
            device,
            layout,
            prefill_chunk=self.options.chunk(drafts),
            deterministic=self.options.deterministic,
            buckets=decode_buckets(self.options.max_batch, drafts, depth) if is_captured else (),
            parts=step.parts,
            paging=placement.paging,
            rings=placement.rings,
        )
        # Last, so that an object that cannot be refreshed stays what it was.
        self._step, self._captured, self._freshness = step, captured, freshness
        self._records, self.graph_module = form.records, form.graphs[0]
        self._make, self._forms = forms, {(step.used, False): form}
        return engine

    def _compare_from_now(self, captured: tuple[CompiledModel, ...], forms: Collection[Form]) -> Freshness:
        """What later changes of the model are compared with: what it is now."""
        graphs = (*(g for form in forms for g in form.graphs), *(c.graph_module for c in captured))
        looked_at = [tensor for c in captured for tensor in c.looked_at.values()]
        return Freshness(Structure(self.model, self.drafter), graphs, looked_at)

    def _select(self, used: Collection[str], *, hooked: bool) -> None:
        key = (self._served_with(used), hooked)
        if key not in self._forms:
            with compiling:
                step = self._step.suited(key[0], shows_logits=key[1])
                form = self._make.halved(step) if key[1] else self._make.whole(step)
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
        from emssd_compile.pipeline import compile_checked  # brings sympy: not needed to import us

        with self._turns.take("refresh"), compiling, neutral(self._default_dtype):
            check_model(self.model)
            try:
                self._follow()
            except StaleModelError:
                check_weights(self.model)
                check_weights(self._step.drafter)
                step = self._step
                parts = step.rule, step.drafter, self.options, step.processors, step.probes
                self._take(self._assemble(*compile_checked(self.model, *parts), again=True))

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
        placement = self._make.placement
        memory = describe(self._engine.variant.signature, placement.paging, placement.rings)
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

        if self.options.kv_dtype is not None:
            raise OptionError(
                f"artifacts keep keys and values as the model computes them, and this model was compiled with kv_dtype="
                f"{self.options.kv_dtype!r}; compile it without, to export it"
            )
        honoured = honoured_options(self.row_options, row_options, self.generation_config, self._vocabulary)
        with self._turns.take("export"):
            self._follow()  # what is written is the model as it is now
            # a format of few inputs for whoever drives the step: it drafts for all rows
            step = self._step.suited(self._served_with(honoured), drafts_for_few=False)
        what = Exportable(step, self.options, self._engine.chunk, self.device, self.dtype, self.generation_config)
        with compiling, progress_bar(progress, len(STAGES), f"exporting to {target}") as advance:
            chosen: dict[str, Any] = {"verify_only": verify_only, "check": check, "tokenizer": tokenizer, **options}
            export(what, target, Path(folder), advance=advance, **chosen)
