"""`optimize(model)`: where capture, passes, lowering and runtime meet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from emssd_compile.acceptance import make_rule
from emssd_compile.capture import check_model
from emssd_compile.decoder import Decoder
from emssd_compile.drafters import make_drafter
from emssd_compile.errors import OptionError
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import BACKENDS
from emssd_compile.options import CompileOptions
from emssd_compile.report import Explanation
from emssd_compile.runtime.assembly import assemble
from emssd_compile.runtime.buckets import decode_buckets
from emssd_compile.runtime.consumer import progress_bar
from emssd_compile.step.acceptance import Rule
from emssd_compile.step.signature import Signature

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledModel, CompiledStep

_LENGTH_ATTRIBUTES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length", "block_size")


def optimize(
    model: nn.Module,
    drafter: str | nn.Module = "prompt-lookup",
    *,
    max_batch: int = 8,
    max_length: int | None = None,
    backend: str = "inductor",
    layout: str = "auto",
    acceptance: str | Rule = "auto",
    prefill_chunk: int = 512,
) -> OptimizedModel:
    """Compile a causal language model into a fused draft-and-verify step over unpadded batches.

    The tokens that `generate` gives are the model's own: in fp32 exactly those of its greedy decoding of each prompt
    alone. Weights are shared with `model`. Only Inductor on a CPU holds the matrices a second time, in the layout that
    it multiplies fastest, unless that takes more than half of the memory available (`explain()` says so then).

    Args:
        model: a Hugging Face causal LM, or any module whose forward maps `ids[1, T]` to logits (a tensor, a tuple
            whose first item is logits, or an object with `.logits`). In eval mode.
        drafter: `"none"`, `"prompt-lookup"`, a `Drafter`, or a smaller causal LM (classic two-model speculation).
        max_batch: rows decoded together; further prompts are queued.
        max_length: tokens a row can hold, prompt and output together. Default: the model's limit.
        backend: `"inductor"` (compiled at first use or by `warmup()`) or `"eager"`.
        layout: `"auto"`: each step verifies the drafts that, by measured times and acceptance, make tokens come faster,
            and none where plain decoding is faster. `"packed"`: all drafts, without padding. `"padded"`: K + 1 tokens
            for each row, used or not. The tokens that come out never differ.
        acceptance: `"auto"` (the best lossless rule), a rule's name, or a `Rule`.
        prefill_chunk: most packed tokens of a step.

    Raises:
        InvalidInputError: the model is in training mode or its weights are unusable.
        OptionError: an option is unknown or out of range.
        UnsupportedModelError: the model cannot be compiled to give exactly its own tokens; says where and why.
        DrafterError: the drafter does not fit the model.
        CapacityError: the KV caches do not fit into memory.
        BackendError: the backend lacks something here: a C++ compiler, or a folder for what it compiles.
    """
    from emssd_compile.compiler import compile_model, compile_step  # brings sympy: not needed to import us
    from emssd_compile.selfcheck import check_against
    from emssd_compile.step.batch import BatchShape

    check_model(model)
    rule, proposer = make_rule(acceptance), make_drafter(drafter)
    options = CompileOptions(max_batch, _resolve_length(model, max_length), backend, layout, prefill_chunk)
    BACKENDS[options.backend].require(_device(model))
    batch = BatchShape(options.max_batch, options.max_length)
    compiled = compile_model(model, batch)
    check_against(model, compiled)

    def compile_draft_model(draft_model: nn.Module) -> CompiledModel:
        draft = compile_model(draft_model, batch)
        check_against(draft_model, draft)
        return draft

    proposer.prepare(compile_draft_model, batch.rows, batch.capacity, compiled.vocabulary)
    step = compile_step(compiled, batch, rule, proposer, LAYOUTS[layout].policy())
    return OptimizedModel(model, step, options)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _resolve_length(model: nn.Module, max_length: int | None) -> int:
    config = getattr(model, "config", None)
    found = [getattr(config, name, None) for name in _LENGTH_ATTRIBUTES]
    limit = next((value for value in found if isinstance(value, int) and value > 0), None)  # -1 says "no limit"
    if max_length is None:
        if limit is None:
            raise OptionError("max_length is needed: the model's config states no longest sequence")
        return limit
    if isinstance(max_length, int) and limit is not None and max_length > limit:
        raise OptionError(f"max_length={max_length} is more than the {limit} positions the model was made for")
    return max_length


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

    def __init__(self, model: nn.Module, step: CompiledStep, options: CompileOptions) -> None:
        self.model = model
        self.drafter = step.drafter
        self.options = options
        self._step = step
        backend, device, rows = BACKENDS[options.backend], _device(model), options.max_batch
        self._records = [*step.records]
        self.graph_module = step.for_target(backend.passes(device), self._records)
        super().__init__(
            assemble(
                backend.lower(self.graph_module),
                Signature.of(self.graph_module.graph, step.roles),
                device,
                LAYOUTS[options.layout],
                prefill_chunk=options.prefill_chunk,
                buckets=decode_buckets(rows, step.drafter.num_draft_tokens) if backend.is_captured else (),
            )
        )

    @property
    def config(self) -> Any:
        """The model's configuration, if it has one."""
        return getattr(self.model, "config", None)

    @property
    def generation_config(self) -> Any:
        """The model's generation defaults, if it has any."""
        return getattr(self.model, "generation_config", None)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights."""
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    def explain(self) -> Explanation:
        """What each pass did and refused, and which ops the step holds; prints as tables."""
        return Explanation.of(self._records, self.graph_module)

    def export_onnx(
        self,
        folder: str | Path,
        *,
        opset_version: int = 24,
        verify_only: bool = False,
        check: bool = True,
        progress: bool = False,
    ) -> None:
        """Write the step as an ONNX model of standard operators, with all that `emssd_compile.load` needs.

        Args:
            folder: the artifact; must not exist, or be empty.
            opset_version: of ONNX; 24 is the first with attention over a KV cache.
            verify_only: the model on packed rows alone, for a loop of your own (`emssd_compile.export.open_graph`).
            check: decode a few prompts with the artifact before it is finished, and compare; in float32 only.
            progress: show a progress bar.

        Raises:
            OptionError: an option is out of range.
            UnsupportedModelError: an op of the model cannot be expressed; says which, and where it comes from.
            ArtifactError: onnx is not installed, or for the check onnxruntime; the folder cannot be written; or the
                check fails. Nothing is left behind.
            CapacityError: the check needs another set of KV caches, and they do not fit into memory.
        """
        self._export("onnx", folder, verify_only, check, progress, opset_version=opset_version)

    def export_aot(
        self, folder: str | Path, *, verify_only: bool = False, check: bool = True, progress: bool = False
    ) -> None:
        """Write the step as machine code (an AOTInductor package), with all that `emssd_compile.load` needs.

        Args and errors are those of `export_onnx`.
        """
        self._export("aot", folder, verify_only, check, progress)

    def export_tensorrt(
        self,
        folder: str | Path,
        *,
        verify_only: bool = False,
        check: bool = True,
        progress: bool = False,
        **options: Any,
    ) -> None:
        """Build a TensorRT engine of the step, with all that `emssd_compile.load` needs.

        Args:
            folder: the artifact; must not exist, or be empty.
            verify_only, check, progress: as in `export_onnx`; the check needs a GPU.
            **options: the attributes of `emssd_compile.export.tensorrt.BuildOptions`: `compute_capabilities` (GPUs to
                build for, as in `["8.9"]`; default: the one that is here), `attention`, `weights`, ...

        Raises:
            OptionError: an option is unknown or out of range, or the runtime cannot do it.
            UnsupportedModelError: TensorRT has nothing that does what an op does; says which, and where it comes from.
            ArtifactError: no TensorRT is installed, or it fails to build; says what it said. Nothing is left behind.
        """
        self._export("tensorrt", folder, verify_only, check, progress, **options)

    def _export(
        self, target: str, folder: str | Path, verify_only: bool, check: bool, progress: bool, **options: Any
    ) -> None:
        from emssd_compile.exporting import STAGES, Exportable, export

        what = Exportable(self._step, self.options, self._engine.chunk, self.device, self.dtype, self.generation_config)
        with progress_bar(progress, len(STAGES), f"exporting to {target}") as advance:
            export(what, target, Path(folder), verify_only=verify_only, check=check, advance=advance, **options)
