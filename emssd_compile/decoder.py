"""Decoding with the names and conventions of Hugging Face, around an engine."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor

from emssd_compile.ambient import neutral
from emssd_compile.calls import Terms, read_call
from emssd_compile.continuous_batching import ContinuousBatching
from emssd_compile.errors import OptionError
from emssd_compile.generation import own_options
from emssd_compile.grammar import Grammar
from emssd_compile.jobs import Job, Jobs
from emssd_compile.numeric import flag
from emssd_compile.progress import progress_bar, working
from emssd_compile.report import Explanation
from emssd_compile.runtime.admission import Admission
from emssd_compile.runtime.containers import Array
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.outputs import GenerateOutput
from emssd_compile.runtime.requests import Request
from emssd_compile.runtime.turns import Turns
from emssd_compile.scheduler import Scheduler
from emssd_compile.session import Session
from emssd_compile.stats import Stats
from emssd_compile.step.options import RowOption
from emssd_compile.step.probe import ReadingSpec

if TYPE_CHECKING:
    from emssd_compile.lowering.halves import LogitsHook

KindT = TypeVar("KindT", Tensor, list[list[int]], list[Tensor], Array, list[Array])


class Decoder(ContinuousBatching, ABC):
    """What decodes: `generate`, `stats` and `explain`, whatever runs the steps.

    Attributes:
        stats: what decoding did since `stats.reset()`.
    """

    _has_hooks = False  # whether there is a form of the step with a place for Python
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

    def _follow(self) -> None:
        """Take over what has changed since the step was made, or raise StaleModelError."""

    def _select(self, used: Collection[str], *, hooked: bool) -> None:
        """Drive the form of the step that honours these options of rows."""

    def _calling(self, hooks: tuple[LogitsHook, ...]) -> AbstractContextManager[None]:
        """Within it, steps of a form with a place for Python call the hooks."""
        return contextlib.nullcontext()

    @property
    @abstractmethod
    def row_options(self) -> dict[str, RowOption]:
        """What each request may set for the parts of the step, by the keyword of `generate`."""

    @property
    def _is_ours(self) -> bool:
        """Whether all that changes logits is known to come with the package; an artifact does not say."""
        return False

    @property
    def _keeps_prefixes(self) -> bool:
        """Whether what is read stays for requests to come."""
        return False

    @property
    def _assisted(self) -> dict[str, object]:
        """What `Drafter.assisted` says; of an artifact nothing but the drafter's name is known."""
        return {}

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

    def warmup(self, *, progress: bool = False, hooks: bool = False, **options: Any) -> None:
        """Compile and measure now rather than in the first `generate`.

        Args:
            progress: show what is going on.
            hooks: compile the form in two halves, which calls with a `grammar`, a `logits_hook` or a
                `logits_processor` take.
            **options: those of `generate` that later calls will set: what honours them is compiled into a form of the
                step of its own, which is compiled here rather than when a call sets them first.

        Raises:
            OptionError: an option is none of a row's, out of range, or without effect by itself.
            NotImplementedError: hooks, of an artifact, which has one form.
        """
        used = self._used_by(options)
        if flag("hooks", hooks) and not self._has_hooks:
            raise NotImplementedError("warmup: an artifact's step is one graph, with no place for hooks; use optimize")
        with self._turns.take("warmup"), neutral(self._default_dtype):
            self._follow()
            self._select(used, hooked=hooks)
            self._warm_up(progress)

    def _used_by(self, options: Mapping[str, Any]) -> frozenset[str]:
        """Those of these options of rows that ask for something, and what they imply."""
        unknown = sorted(options.keys() - self.row_options.keys())
        if unknown:
            raise OptionError(
                f"{unknown[0]} asks for no form of the step of its own; those that do: "
                f"{', '.join(self.row_options) or 'none'}"
            )
        (used,) = own_options(self.row_options, options, 1, self._vocabulary, asked=options)
        return frozenset(used)

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
        cache_salt: str | Sequence[str | None] | None = None,
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
            cache_salt: prompts of different ones share nothing of what is read (`memory="paged"`), so that none of them
                tells by the time it takes what others begin with: one for all prompts, or one for each, None among them
                for no salt.
            progress: show a progress bar.
            **options: what the parts of the step declare (`row_options`): a number, or one for each prompt; lists and
                dicts of tokens, for all prompts; and Hugging Face's names: `max_new_tokens`, `max_length`,
                `min_new_tokens`, `eos_token_id` (also a list of lists, one for each prompt), `pad_token_id`,
                `stopping_criteria`, `streamer`,
                `return_dict_in_generate` (a `GenerateOutput`, with what `output_scores`, `output_logits`, `logprobs`
                and `top_logprobs` ask for), ... Stopping criteria are called as transformers calls them: with all rows,
                `[B, n]`, once for each token that they get. Rows of different lengths are padded on the left. With more
                prompts than `max_batch`, rows run to their end before the criteria have seen all of them.

        Autocast, inference mode and default dtypes around the call change nothing: dtypes are those that the model was
        compiled with.

        Raises:
            StaleModelError: the model was changed in a way that must be compiled anew; see `OptimizedModel.refresh`.
            InvalidInputError: the prompts are not what they must be; raised before any work, as all errors here.
            CapacityError: a prompt does not fit a row, or the pool that rows share.
            OptionError: an option is unknown or out of range; or, while decoding, a stopping criterion answers with
                something that is no answer.
            GrammarError: a text has nothing to go on with under its grammar and the other options.
            ReentryError: the call was made from inside another one, by its stopping criterion or streamer.
            SessionError: a session of this object is open, and decodes.
            NotImplementedError: an option of Hugging Face that is not supported; says which.
        """
        with neutral(self._default_dtype):
            call = read_call(
                self._terms,
                inputs,
                generation_config,
                options,
                attention_mask=attention_mask,
                input_ids=input_ids,
                token_type_ids=token_type_ids,
                logits_hook=logits_hook,
                grammar=grammar,
                seed=seed,
                cache_salt=cache_salt,
                rows=lambda: self._engine.requests,
            )
            total = sum(request.max_new_tokens for request in call.requests)
            with self._turns.take("generate"):
                jobs, job = Jobs[Job](), Job(call)
                jobs.put(job)
                scheduler = Scheduler(self, jobs)
                if scheduler.prepare():
                    with progress_bar(progress, total) as job.advance:
                        scheduler.decode()
                        job.raise_error()  # within: no bar comes to its end then
                job.raise_error()
            return call.result(self.readings)

    @property
    def _terms(self) -> Terms:
        return Terms(
            self._vocabulary,
            self._engine.capacity,
            self.row_options,
            self.readings,
            self.generation_config,
            self._has_hooks,
            self._assisted,
            self._is_ours,
            self._engine.memory.check,
        )

    @contextlib.contextmanager
    def _running(self, requests: Admission, eos: Collection[int]) -> Iterator[Iterator[Request]]:
        """Have steps run: gives each request that has new tokens, until none waits and none runs.

        However the `with` ends, what was counted is in the stats, and no row is busy.
        """
        try:
            with contextlib.closing(self._engine.run(requests, [*eos])) as run:
                yield run
        finally:
            self._count()

    def _count(self) -> None:
        """Have all that was counted in the stats."""
        self.stats.add(*self._engine.counters())

    def session(self, *, max_queue: int = 64, **options: Any) -> Session:
        """Take requests while others decode: `with fast.session() as session: stream = session.submit(prompt)`.

        A thread of its own decodes, until the session is closed; `generate`, `warmup`, `refresh` and the exports are
        refused meanwhile. It waits for a `generate` of another thread that is not over.

        Args:
            max_queue: most requests that wait for a row; a `submit` beyond raises QueueFullError, or waits for room.
            **options: as of `warmup`: what honours them is in every step, so no request that sets them waits for
                another form to be compiled. They change no token of those that do not, and take a little time.

        Raises:
            SessionError: a session of this object is open already.
            ReentryError: the call was made from inside a `generate`, by its stopping criterion or streamer.
            OptionError: `max_queue` is no number of requests, or an option is as `warmup` refuses it.
        """
        return Session(self, max_queue=max_queue, options=options)

    def can_generate(self) -> bool:
        """True: `transformers.pipeline` asks, and then looks the class up among those that it knows by name."""
        known = getattr(sys.modules.get("transformers.pipelines.base"), "SUPPORTED_PEFT_TASKS", {})
        names = known.get("text-generation", [])
        if type(self).__name__ not in names:
            names.append(type(self).__name__)
        return True
