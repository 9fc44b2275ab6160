"""Decoding with the names and conventions of Hugging Face, around an engine."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor

from emssd_compile.ambient import neutral
from emssd_compile.errors import OptionError
from emssd_compile.generation import GenerateOptions, merge_configs, own_options, resolve_options, row_seeds
from emssd_compile.grammar import Grammar
from emssd_compile.grammar_logits import GrammarLogits, grammar_of_each
from emssd_compile.numeric import shown
from emssd_compile.progress import progress_bar, working
from emssd_compile.python_logits import PythonLogits
from emssd_compile.report import Explanation
from emssd_compile.runtime.consumer import Consumer
from emssd_compile.runtime.containers import Array
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.inputs import PromptBatch, parse_prompts
from emssd_compile.runtime.outputs import GenerateOutput, arrange, limit_rows
from emssd_compile.runtime.requests import Request
from emssd_compile.runtime.turns import Turns
from emssd_compile.stats import Stats
from emssd_compile.step.options import RowOption
from emssd_compile.step.probe import ReadingSpec

if TYPE_CHECKING:
    from emssd_compile.lowering.halves import LogitsHook

KindT = TypeVar("KindT", Tensor, list[list[int]], list[Tensor], Array, list[Array])


class Decoder(ABC):
    """What decodes: `generate`, `stats` and `explain`, whatever runs the steps.

    Attributes:
        stats: what decoding did since `stats.reset()`.
    """

    input_modalities, output_modalities = "text", ("text",)  # read by `repr` of a `transformers.pipeline`

    def __init__(self, engine: Engine, *, guarantee: str) -> None:
        self.stats = Stats(guarantee=guarantee)
        self._default_dtype = torch.get_default_dtype()
        self._turns = Turns()
        self._take(engine)

    def _take(self, engine: Engine) -> None:
        self._engine = engine
        self._vocabulary = len(engine.tensors["is_eos"])
        self._is_warm = False

    def _follow(self) -> None:  # noqa: B027  (what was loaded has no model that could change)
        """Take over what has changed since the step was made, or raise StaleModelError."""

    def _select(self, used: Collection[str], *, hooked: bool) -> None:
        """Drive the form of the step that honours these options of rows; an artifact holds one form."""
        if hooked:
            raise NotImplementedError(
                "logits_hook, logits_processor, prefix_allowed_tokens_fn, grammar: an artifact's step is one graph, "
                "with no place for Python in it; use optimize"
            )

    def _calling(self, hooks: tuple[LogitsHook, ...]) -> AbstractContextManager[None]:
        """Within it, steps of a form with a place for Python call the hooks."""
        return contextlib.nullcontext()

    def _hook(self, chosen: GenerateOptions, own: LogitsHook | None) -> LogitsHook | None:
        """What is to be called between the halves of each step, if anything."""
        processors, allowed = chosen.logits_processor, chosen.prefix_allowed_tokens_fn
        if own is not None and not callable(own):
            raise OptionError(f"logits_hook={shown(own)} cannot be called; pass a function of a LogitContext")
        if not processors and allowed is None:
            return own
        if own is not None:
            raise OptionError("logits_hook, and logits_processor or prefix_allowed_tokens_fn: pass one of them")
        return PythonLogits(processors, allowed, lambda: self._engine.requests)

    @property
    @abstractmethod
    def row_options(self) -> dict[str, RowOption]:
        """What each request may set for the parts of the step, by the keyword of `generate`."""

    @property
    @abstractmethod
    def readings(self) -> dict[str, ReadingSpec]:
        """What probes may tell of each token, by the names of results."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds compiled code and the KV caches of its rows, and can be neither copied nor "
            "pickled. Write it with export_onnx, export_aot or export_tensorrt, and emssd_compile.load that wherever "
            "it is needed; or copy the model, and optimize the copy"
        )

    @property
    @abstractmethod
    def generation_config(self) -> Any:
        """Defaults of the options of `generate`, if there are any."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Element type of the weights."""

    @property
    def device(self) -> torch.device:
        """Where the steps run."""
        return self._engine.tensors["history"].device

    @abstractmethod
    def explain(self) -> Explanation:
        """What each pass did and refused, and which ops the step holds; prints as tables."""

    def warmup(self, *, progress: bool = False, **options: Any) -> None:
        """Compile and measure now rather than in the first `generate`.

        Args:
            progress: show what is going on.
            **options: those of `generate` that later calls will set: what honours them is compiled into a form of the
                step of its own, which is compiled here rather than when a call sets them first.

        Raises:
            OptionError: an option is none of a row's, out of range, or without effect by itself.
        """
        unknown = sorted(options.keys() - self.row_options.keys())
        if unknown:
            raise OptionError(
                f"warmup: {unknown[0]} asks for no form of the step of its own; those that do: "
                f"{', '.join(self.row_options) or 'none'}"
            )
        (used,) = own_options(self.row_options, options, 1, self._vocabulary, asked=options)
        with self._turns.take("warmup"), neutral(self._default_dtype):
            self._follow()
            self._select(used, hooked=False)
            self._warm_up(progress)

    def _warm_up(self, progress: bool) -> None:
        with working("compiling the step", shown=progress):
            self._engine.warmup()
        graphs = len(self._engine.launcher.buckets)
        with progress_bar(progress and graphs > 0, graphs, "CUDA graphs") as advance:
            for _ in self._engine.capture():
                advance(1)
        with working("measuring the step", shown=progress and self._engine.is_measured):
            self._engine.calibrate()
        self._engine.counters()
        self._is_warm = True

    # What comes back is of the kind that went in: constrained, so that a list of lists is not one of something else.
    @overload
    def generate(
        self,
        inputs: KindT,
        generation_config: object | None = None,
        *,
        return_dict_in_generate: Literal[False] | None = None,
        **options: Any,
    ) -> KindT: ...
    @overload
    def generate(
        self,
        inputs: KindT,
        generation_config: object | None = None,
        *,
        return_dict_in_generate: Literal[True],
        **options: Any,
    ) -> GenerateOutput[KindT]: ...
    @overload
    def generate(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: object | None = None,
        *,
        return_dict_in_generate: Literal[False] | None = None,
        **options: Any,
    ) -> list[list[int]]: ...
    @overload
    def generate(
        self,
        inputs: Sequence[Tensor],
        generation_config: object | None = None,
        *,
        return_dict_in_generate: Literal[False] | None = None,
        **options: Any,
    ) -> list[Tensor]: ...
    @overload
    def generate(
        self,
        inputs: None = None,
        generation_config: object | None = None,
        *,
        input_ids: KindT,
        return_dict_in_generate: Literal[False] | None = None,
        **options: Any,
    ) -> KindT: ...
    @overload
    def generate(
        self,
        inputs: None = None,
        generation_config: object | None = None,
        *,
        input_ids: KindT,
        return_dict_in_generate: Literal[True],
        **options: Any,
    ) -> GenerateOutput[KindT]: ...
    @overload
    def generate(self, inputs: Mapping[str, Any], generation_config: object | None = None, **options: Any) -> Any: ...
    @overload
    def generate(
        self,
        inputs: object = None,
        generation_config: object | None = None,
        *,
        return_dict_in_generate: bool,
        **options: Any,
    ) -> Any: ...

    def generate(
        self,
        inputs: object = None,
        generation_config: object | None = None,
        *,
        attention_mask: object = None,
        input_ids: object = None,
        token_type_ids: object = None,
        logits_hook: LogitsHook | None = None,
        grammar: Grammar | Sequence[Grammar | None] | None = None,
        seed: int | Sequence[int] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Any:
        """Continue each prompt with exactly the tokens the model would give it alone: greedily, or by sampling.

        One call decodes at a time: a second thread waits until the first one's is over.

        Args:
            inputs: `LongTensor[B, S]` (with `attention_mask`, padding on either side), a list of token lists or of 1-D
                tensors, or a jagged nested tensor; or arrays of numpy where tensors may be. The same kind comes back,
                prompts included.
            generation_config: defaults for `options`, as in Hugging Face; or a list with one for each prompt, which may
                differ in lengths and in `row_options`.
            attention_mask: `[B, S]`, 0 where a tensor is padded.
            input_ids: Hugging Face's name for `inputs`.
            token_type_ids: accepted if all zero.
            logits_hook: Python that changes logits: `hook(context) -> logits`, called once a step, between its two
                halves, with the logits of all packed tokens and the text before each, drafts included
                (`emssd_compile.logits.LogitContext`). It comes behind all logits processors. Tokens are those of
                decoding without drafts if what it does to a logit depends on the text before it only. Filters of
                sampling (`temperature`, `top_p`, ...) come behind it. transformers' `logits_processor` and
                `prefix_allowed_tokens_fn` are called in the same place, each packed token with its own text.
            grammar: what the new tokens spell keeps to it (`emssd_compile.grammar`): one for all prompts, or a list
                with one for each, None for a prompt without. An EOS comes exactly where the grammar may end; a row that
                reaches its limit before is cut. It comes behind `logits_hook` and processors, before the filters.
            seed: of what is drawn where `do_sample` is set: one for each prompt, or one from which each prompt gets a
                seed of its own, the first the seed itself. A prompt with the same seed and options is continued in the
                same way, whatever it is batched with and whatever drafts. Default: from torch's generator, so that
                `torch.manual_seed` makes a program repeatable.
            progress: show a progress bar.
            **options: what the parts of the step declare (`row_options`): a number, or one for each prompt; lists and
                dicts of tokens, for all prompts; and Hugging Face's names: `max_new_tokens`, `max_length`,
                `min_new_tokens`, `eos_token_id`, `pad_token_id`, `stopping_criteria`, `streamer`,
                `return_dict_in_generate` (a `GenerateOutput`, with what `output_scores`, `output_logits`, `logprobs`
                and `top_logprobs` ask for), ... Stopping criteria are called as transformers calls them: with all rows,
                `[B, n]`, once for each token that they get. Rows of different lengths are padded on the left. With more
                prompts than `max_batch`, rows run to their end before the criteria have seen all of them.

        Autocast, inference mode and default dtypes around the call change nothing: dtypes are those that the model was
        compiled with.

        Raises:
            StaleModelError: the model was changed in a way that must be compiled anew; see `OptimizedModel.refresh`.
            InvalidInputError: the prompts are not what they must be; raised before any work, as all errors here.
            CapacityError: a prompt does not fit a row.
            OptionError: an option is unknown or out of range; or, while decoding, a stopping criterion answers with
                something that is no answer.
            GrammarError: a text has nothing to go on with under its grammar and the other options.
            ReentryError: the call was made from inside another one, by its stopping criterion or streamer.
            NotImplementedError: an option of Hugging Face that is not supported; says which.
        """
        with neutral(self._default_dtype):
            return self._generate(
                inputs,
                generation_config,
                attention_mask,
                input_ids,
                token_type_ids,
                logits_hook,
                grammar,
                seed,
                progress,
                options,
            )

    def _generate(
        self,
        inputs: object,
        generation_config: object | None,
        attention_mask: object,
        input_ids: object,
        token_type_ids: object,
        logits_hook: LogitsHook | None,
        grammar: Grammar | Sequence[Grammar | None] | None,
        seed: int | Sequence[int] | None,
        progress: bool,
        options: dict[str, Any],
    ) -> Any:
        vocabulary, capacity = self._vocabulary, self._engine.capacity
        known = self.row_options
        configs = generation_config if isinstance(generation_config, (list, tuple)) else [generation_config]
        if not configs:
            raise OptionError("generation_config is an empty list; pass one for each prompt, or one for all")
        settings = {"stored": self.generation_config, "vocab_size": vocabulary, "of_parts": known}
        each = [
            *map(partial(resolve_options, kwargs=options, **settings), configs)
        ]  # no frame more: warnings count them
        chosen = merge_configs(each, options) if len(each) > 1 else each[0]
        prompts = parse_prompts(
            inputs,
            attention_mask,
            vocab_size=vocabulary,
            capacity=capacity,
            pad_token_id=chosen.prompt_pad_token_id,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
        )
        if len(each) not in (1, len(prompts)):
            raise OptionError(f"generation_config is {len(each)} configs for {len(prompts)} prompts; pass one for each")
        own_hook, grammars = self._hook(chosen, logits_hook), grammar_of_each(grammar, len(prompts))
        times = chosen.num_return_sequences
        prompts = prompts.repeated(times)
        of_rows = [own for own in each for _ in range(times)] if len(each) > 1 else []
        limits = limit_rows(chosen, prompts, capacity, of_rows)
        given = {**chosen.of_parts, "min_new_tokens": limits.min_new_tokens[::times]}  # one for each prompt
        if "min_new_tokens" not in known:
            del given["min_new_tokens"]
            if any(limits.min_new_tokens):
                raise NotImplementedError(
                    "min_new_tokens, or min_length: this artifact does not honour it; name it in row_options when you "
                    "export"
                )
        own = own_options(known, given, len(prompts) // times, vocabulary, asked=options)
        self._check_shown(own, chosen)
        draws = [bool(row.get("do_sample")) for row in own]
        if times > 1 and not all(draws):
            raise OptionError(
                f"num_return_sequences={times}, but prompt {draws.index(False)} does not sample: its sequences would "
                "all be the same; pass do_sample=True"
            )
        seeds = row_seeds(seed, len(own), times, draws=any(draws))
        texts = prompts.values.split(prompts.lengths)
        requests = [
            Request(i, ids, most, own[i // times], group=i // times, seed=seeds[i])
            for i, (ids, most) in enumerate(zip(texts, limits.max_new_tokens, strict=True))
        ]
        masks = GrammarLogits.of(grammars, times, chosen.eos_token_ids, lambda: self._engine.requests)
        hooks = tuple(hook for hook in (own_hook, masks) if hook is not None)
        with self._turns.take("generate"):
            self._follow()
            self._select({name for options in own for name in options}, hooked=bool(hooks))
            if not self._is_warm:
                self._warm_up(progress=False)
            with self._calling(hooks):
                self._decode(prompts, requests, chosen, progress)
            if masks is not None:
                masks.settle()
        sequences = prompts.restore([r.output for r in requests], chosen.pad_token_id)
        if not chosen.return_dict_in_generate:
            return sequences
        return GenerateOutput(sequences, **arrange(self.readings, requests, prompts.device))

    def _check_shown(self, own: Sequence[Mapping[str, object]], chosen: GenerateOptions) -> None:
        """Refuse to tell something that would not be returned."""
        by = {spec.asked_by for spec in self.readings.values()}
        asked = sorted({name for row in own for name in row} & by)
        if asked and not chosen.return_dict_in_generate:
            raise OptionError(
                f"{asked[0]}: the sequences alone would be returned; pass return_dict_in_generate=True as well"
            )

    def _decode(self, prompts: PromptBatch, requests: list[Request], chosen: GenerateOptions, progress: bool) -> None:
        """Run the requests to their ends. However that ends, what was counted is in the stats, and no row is busy."""
        total = sum(request.max_new_tokens for request in requests)
        consumer = Consumer(prompts, requests, chosen)
        try:
            with (
                progress_bar(progress, total) as advance,
                contextlib.closing(self._engine.run(requests, chosen.eos_token_ids)) as run,
            ):
                for request in run:
                    advance(consumer.take(request))
        finally:
            self.stats.add(*self._engine.counters())
        consumer.end()

    def can_generate(self) -> bool:
        """True: `transformers.pipeline` asks."""
        return True
