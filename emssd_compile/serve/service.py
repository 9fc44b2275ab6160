"""From requests to the texts that answer them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from emssd_compile import keywords
from emssd_compile.chat import chat_tokens, check_template
from emssd_compile.decoder import Decoder
from emssd_compile.errors import CapacityError, OptionError
from emssd_compile.generation import row_seeds
from emssd_compile.serve.choice import Choice
from emssd_compile.serve.errors import ApiError
from emssd_compile.serve.formats import Formats
from emssd_compile.serve.limits import Limits
from emssd_compile.serve.logprobs import LogprobReader
from emssd_compile.serve.metrics import Metrics
from emssd_compile.serve.sampling import row_options, warmed_options
from emssd_compile.serve.schemas import ChatBody, CompletionBody, SamplingBody
from emssd_compile.text import Detokenizer, StopTexts

_COMPLETION_TOKENS = 16  # what OpenAI gives where nobody says


@dataclass(frozen=True)
class Asked:
    """What is to be decoded for a request.

    Attributes:
        prompts: token ids of each.
        body: says how.
        max_tokens: new tokens of a text; None: as many as there may be.
        logprobs: how many of the likeliest tokens are told in the place of each; None if nothing is told.
        options: more of `Session.submit`.
        echoes: the text of each prompt, where it is to be shown.
    """

    prompts: Sequence[Sequence[int]]
    body: SamplingBody
    max_tokens: int | None
    logprobs: int | None
    options: dict[str, Any] = field(default_factory=dict)
    echoes: Sequence[str] = ()


class Service:
    """A session of a model, and its tokenizer.

    Args:
        decoder: what decodes; has a session open as long as the service.
        tokenizer: of transformers, the model's own.
        name: what clients call the model.
        limits: of requests.
        warmup: fields of requests that steps are compiled for beforehand, of `WARMED`.

    Attributes:
        session, metrics: of it.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Any, *, name: str, limits: Limits, warmup: Collection[str] = ()
    ) -> None:
        self.name, self.tokenizer = name, tokenizer
        self._limits, self._formats = limits, Formats(tokenizer)
        self._defaults, self._known = decoder.generation_config, decoder.row_options
        self._eos = frozenset(keywords.token_ids("eos_token_id", getattr(self._defaults, "eos_token_id", None)))
        options, hooked = warmed_options(warmup)
        if hooked:
            decoder.warmup(hooks=True, **options)
        if warmup:
            decoder.warmup(**options)
        self.session = decoder.session(max_queue=limits.max_queue, **options)
        self._most_texts = limits.max_queue + self.session.num_rows
        self.metrics = Metrics(name, self.session)

    def completion(self, body: CompletionBody) -> Asked:
        """Read a request to `/v1/completions`."""
        self.check_model(body.model)
        given: Any = body.prompt
        is_one = isinstance(given, str) or (given and isinstance(given[0], int))
        several = [given] if is_one else given
        self._check_count(len(several), body.n)
        prompts = [self.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in several]
        limit = self._limits.max_tokens or _COMPLETION_TOKENS
        most = body.max_tokens or min(limit, _COMPLETION_TOKENS)
        texts = [each if isinstance(each, str) else self._text(each) for each in several] if body.echo else ()
        return Asked(prompts, body, most, body.logprobs, echoes=texts)

    def chat(self, body: ChatBody) -> Asked:
        """Read a request to `/v1/chat/completions`."""
        self.check_model(body.model)
        messages = [message.for_template() for message in body.messages]
        check_template(self.tokenizer, "use /v1/completions")
        prompt = chat_tokens(self.tokenizer, messages)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        grammar = self._formats.grammar(body.response_format)
        if grammar is not None and not self._eos_of(body):
            raise OptionError(
                "response_format with ignore_eos: a complete text has to end with something; leave ignore_eos out, or "
                "pass stop_token_ids"
            )
        told = body.top_logprobs if body.logprobs else None
        return Asked([prompt], body, most, told, {} if grammar is None else {"grammar": grammar})

    def check_model(self, name: str) -> None:
        """Raises ApiError if a client means another model."""
        if name != self.name:
            raise ApiError(
                404, f"there is no model {name!r}; this is {self.name!r}", param="model", code="model_not_found"
            )

    def submit(self, asked: Asked) -> list[Choice]:
        """Have all texts of a request decoded, or none: n for each prompt, in order.

        Raises:
            Exception: what `Session.submit` does; the request's own errors name the prompt.
        """
        body, count = asked.body, len(asked.prompts)
        self._check_count(count, body.n)
        options = row_options(body, self._defaults, self._known) | asked.options
        options |= {"eos_token_id": [*self._eos_of(body)], "cache_salt": body.cache_salt}
        if asked.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": asked.logprobs, "return_dict_in_generate": True}
        seeds = row_seeds(body.seed, count, body.n, draws=options["do_sample"])
        choices: list[Choice] = []
        try:
            for index, seed in enumerate(seeds):
                number = index // body.n
                room = self._room(asked, number)
                choices.append(self._choice(index, asked, asked.prompts[number], room, {**options, "seed": seed}))
        except BaseException:
            for choice in choices:
                choice.abandon()
            raise
        return choices

    def _check_count(self, count: int, n: int) -> None:
        """Raises OptionError if a request has no text, or more than may ever wait and run."""
        if not 1 <= count * n <= self._most_texts:
            raise OptionError(f"{count} prompts with n={n}: a request has from 1 to {self._most_texts} texts here")

    def _text(self, ids: Sequence[int]) -> str:
        """Of a prompt; ids that are none have no text, and are refused when it is submitted."""
        text: str = self.tokenizer.decode([token for token in ids if 0 <= token < len(self.tokenizer)])
        return text

    def _room(self, asked: Asked, number: int) -> int:
        """How many tokens may follow a prompt."""
        length, capacity, limit = len(asked.prompts[number]), self.session.capacity, self._limits.max_tokens
        if limit is not None and asked.max_tokens is not None and asked.max_tokens > limit:
            raise OptionError(f"max_tokens={asked.max_tokens} is more than this server's {limit}; pass at most that")
        most = asked.max_tokens or max(capacity - length, 1)
        if length + most > capacity:
            raise CapacityError(
                f"prompt {number}: {length} tokens and {most} new ones are more than the {capacity} of this "
                "server; pass a smaller max_tokens, or a shorter prompt"
            )
        return most if limit is None else min(most, limit)

    def _choice(
        self, index: int, asked: Asked, prompt: Sequence[int], max_tokens: int, options: dict[str, Any]
    ) -> Choice:
        stream = self.session.submit(list(prompt), max_new_tokens=max_tokens, deadline=self._limits.deadline, **options)
        told = None if asked.logprobs is None else LogprobReader(stream, asked.logprobs, self.tokenizer)
        detokenizer = Detokenizer(self.tokenizer, prompt)
        echo = asked.echoes[index // asked.body.n] if asked.echoes else ""
        stops = StopTexts(asked.body.stops)
        return Choice(index, stream, len(prompt), detokenizer, stops, self._eos_of(asked.body), told, echo)

    def _eos_of(self, body: SamplingBody) -> frozenset[int]:
        """The tokens that end its texts."""
        return frozenset(body.stop_token_ids) | (frozenset() if body.ignore_eos else self._eos)

    def close(self) -> None:
        """Cancel what runs."""
        self.session.close()
