"""`optimize(model)`: where capture, passes, lowering and runtime meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from emssd_compile.acceptance import make_rule
from emssd_compile.capture import check_model
from emssd_compile.drafters import make_drafter
from emssd_compile.errors import OptionError
from emssd_compile.generation import resolve_options
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import BACKENDS
from emssd_compile.options import CompileOptions
from emssd_compile.report import Explanation
from emssd_compile.runtime.buckets import decode_buckets
from emssd_compile.runtime.consumer import Consumer, progress_bar, working
from emssd_compile.runtime.engine import Engine, Request
from emssd_compile.runtime.inputs import Sequences, parse_prompts
from emssd_compile.runtime.launch import make_launcher
from emssd_compile.runtime.memory import allocate
from emssd_compile.runtime.outputs import GenerateOutput, limit_rows
from emssd_compile.stats import Stats
from emssd_compile.step.acceptance import Rule
from emssd_compile.step.drafting import Drafter
from emssd_compile.step.state import StepState

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledModel

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
    """
    from emssd_compile.compiler import BatchShape, compile_model, compile_step  # brings sympy: not needed to import us
    from emssd_compile.selfcheck import check_against

    check_model(model)
    rule, proposer = make_rule(acceptance), make_drafter(drafter)
    options = CompileOptions(max_batch, _resolve_length(model, max_length), backend, layout, prefill_chunk)
    batch = BatchShape(options.max_batch, options.max_length)
    compiled = compile_model(model, batch)
    check_against(model, compiled)

    def compile_draft_model(draft_model: nn.Module) -> CompiledModel:
        draft = compile_model(draft_model, batch)
        check_against(draft_model, draft)
        return draft

    proposer.prepare(compile_draft_model, batch.rows, batch.capacity, compiled.vocabulary)
    policy = LAYOUTS[layout].policy()
    graph_module = compile_step(compiled, batch, rule, proposer, policy, BACKENDS[backend].passes(_device(model)))
    return OptimizedModel(model, compiled, graph_module, proposer, options)


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


class OptimizedModel:
    """A compiled model. Made by `optimize`.

    Attributes:
        model: the user's model; its weights are shared.
        drafter: what proposes tokens.
        options: sizes and choices.
        stats: what decoding did since `stats.reset()`.
        config, generation_config, device, dtype: those of the model.
    """

    input_modalities, output_modalities = "text", ("text",)  # read by `repr` of a `transformers.pipeline`

    def __init__(
        self,
        model: nn.Module,
        compiled: CompiledModel,
        graph_module: fx.GraphModule,
        drafter: Drafter,
        options: CompileOptions,
    ) -> None:
        self.model = model
        self.drafter = drafter
        self.options = options
        self.stats = Stats()
        self.graph_module = graph_module
        self._compiled = compiled
        self._engine = self._make_engine()
        self._is_warm = False

    def _make_engine(self) -> Engine:
        device, drafter = self.device, self.drafter
        caches = allocate({**self._compiled.cache_shapes, **drafter.cache_spec()}, device)  # first: they may not fit
        rows, limit = self.options.max_batch, drafter.num_draft_tokens
        state = StepState.empty(rows, self.options.max_length, self._compiled.vocabulary, limit, device)
        layout = LAYOUTS[self.options.layout]
        policy = layout.policy()
        row_state = allocate({**drafter.state_spec(), **policy.row_spec(rows, limit)}, device)
        memory = allocate(policy.memory_spec(limit, drafter.num_grades), device)
        launcher = make_launcher(
            BACKENDS[self.options.backend].lower(self.graph_module),
            [str(n.target) for n in self.graph_module.graph.nodes if n.op == "placeholder"],
            {**state.tensors(), **row_state, **memory, **caches},
            buckets=() if self.options.backend == "eager" else decode_buckets(rows, limit),
        )
        return Engine(
            launcher,
            tuple(row_state),
            tuple(memory),
            layout,
            prefill_chunk=self.options.prefill_chunk,
            lag=0 if device.type == "cpu" else 1,
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
    def device(self) -> torch.device:
        """Where the weights are."""
        return _device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights."""
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    def warmup(self, *, progress: bool = False) -> None:
        """Compile and measure now rather than in the first `generate`; with `progress`, show what is going on."""
        with working("compiling the step", shown=progress):
            self._engine.warmup()
        graphs = len(self._engine.launcher.buckets)
        with progress_bar(progress and graphs > 0, graphs, "CUDA graphs") as advance:
            for _ in self._engine.capture():
                advance(1)
        with working("measuring the step", shown=progress and self._engine.layout.is_measured):
            self._engine.calibrate()
        self._engine.counters()
        self._is_warm = True

    def generate(
        self,
        inputs: object = None,
        generation_config: object | None = None,
        *,
        attention_mask: object = None,
        input_ids: object = None,
        token_type_ids: object = None,
        progress: bool = False,
        **options: Any,
    ) -> Sequences | GenerateOutput:
        """Continue each prompt greedily, with exactly the tokens the model would give it alone.

        Args:
            inputs: `LongTensor[B, S]` (with `attention_mask`, padding on either side), a list of token lists or of 1-D
                tensors, or a jagged nested tensor. The same kind comes back, prompts included.
            generation_config: defaults for `options`, as in Hugging Face.
            attention_mask: `[B, S]`, 0 where a tensor is padded.
            input_ids: Hugging Face's name for `inputs`.
            token_type_ids: accepted if all zero.
            progress: show a progress bar.
            **options: Hugging Face's names: `max_new_tokens`, `max_length`, `min_new_tokens`, `eos_token_id`,
                `pad_token_id`, `stopping_criteria`, `streamer`, `return_dict_in_generate`, ...

        Raises:
            InvalidInputError: the prompts are not what they must be; raised before any work, as all errors here.
            CapacityError: a prompt does not fit a row.
            OptionError: an option is unknown or out of range.
            NotImplementedError: an option of Hugging Face that is not supported; says which.
        """
        vocabulary, capacity = self._compiled.vocabulary, self.options.max_length
        chosen = resolve_options(generation_config, options, stored=self.generation_config, vocab_size=vocabulary)
        prompts = parse_prompts(
            inputs,
            attention_mask,
            vocab_size=vocabulary,
            capacity=capacity,
            pad_token_id=chosen.prompt_pad_token_id,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
        )
        limits = limit_rows(chosen, prompts, capacity)
        requests = [
            Request(i, prompts.values[start:stop], most, least)
            for i, (start, stop, most, least) in enumerate(
                zip(
                    prompts.offsets[:-1],
                    prompts.offsets[1:],
                    limits.max_new_tokens,
                    limits.min_new_tokens,
                    strict=True,
                )
            )
        ]
        if not self._is_warm:
            self.warmup()
        consumer = Consumer(prompts, chosen.stopping_criteria, chosen.streamer)
        with progress_bar(progress, sum(limits.max_new_tokens)) as advance:
            for request in self._engine.run(requests, chosen.eos_token_ids):
                advance(consumer.take(request))
        consumer.end()
        self.stats.add(*self._engine.counters())
        sequences = prompts.restore([r.output for r in requests], chosen.pad_token_id)
        return GenerateOutput(sequences) if chosen.return_dict_in_generate else sequences

    def explain(self) -> Explanation:
        """What each pass did and refused, and which ops the step holds; prints as tables."""
        return Explanation.of(self._compiled.records, self.graph_module)

    def can_generate(self) -> bool:
        """True: `transformers.pipeline` asks."""
        return True
