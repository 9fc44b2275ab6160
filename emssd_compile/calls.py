"""What a caller asks for, read and checked before any work: one reading for `generate` and for sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from emssd_compile.ends import looks_at_ends
from emssd_compile.errors import OptionError
from emssd_compile.generation import (
    GenerateOptions,
    eos_of_each,
    merge_configs,
    own_options,
    resolve_options,
    row_seeds,
)
from emssd_compile.grammar import Grammar
from emssd_compile.grammar_logits import GrammarLogits, grammar_of_each
from emssd_compile.grammar_processors import take_grammars
from emssd_compile.numeric import shown
from emssd_compile.python_logits import PythonLogits
from emssd_compile.runtime.inputs import PromptBatch, parse_prompts
from emssd_compile.runtime.outputs import GenerateOutput, arrange, limit_rows
from emssd_compile.runtime.requests import Request
from emssd_compile.step.options import RowOption
from emssd_compile.step.probe import ReadingSpec

if TYPE_CHECKING:
    from emssd_compile.lowering.halves import LogitsHook

Rows = Callable[[], Sequence[Request | None]]
"""The request of each row that a hook is shown."""


@dataclass(frozen=True)
class Terms:
    """What calls of a decoder may ask for.

    Attributes:
        vocabulary: V.
        capacity: C.
        row_options: what each request may set for the parts of the step, by name.
        readings: what probes may tell of each token, by the names of results.
        generation_config: defaults of the options, if there are any.
        has_hooks: whether its step has a place for Python.
        assisted: what transformers' options of assisted decoding would have to say to ask for its drafter.
        is_ours: whether all that changes logits is known to come with the package.
        check_memory: raises CapacityError for a request that there never is memory for.
    """

    vocabulary: int
    capacity: int
    row_options: Mapping[str, RowOption]
    readings: Mapping[str, ReadingSpec]
    generation_config: object
    has_hooks: bool
    assisted: Mapping[str, object]
    is_ours: bool
    check_memory: Callable[[Request], None]


@dataclass(frozen=True, eq=False)
class Call:
    """What was asked for, checked.

    Attributes:
        prompts: each as often as it is to be continued.
        requests: one for each of them, in order.
        chosen: the options.
        hooks: Python that is called between the halves of each step, in order.
        masks: the one of them that keeps to grammars, if there is any.
        used: the options of parts that requests set.
        looks_at_ends: whether what changes logits may look at the tokens that end a row.
    """

    prompts: PromptBatch
    requests: list[Request]
    chosen: GenerateOptions
    hooks: tuple[LogitsHook, ...]
    masks: GrammarLogits | None
    used: frozenset[str]
    looks_at_ends: bool

    def result(self, readings: Mapping[str, ReadingSpec]) -> Any:
        """What `generate` returns when all requests have ended; `readings` are those of `Terms`."""
        sequences = self.prompts.restore([request.output for request in self.requests], self.chosen.pad_token_id)
        if not self.chosen.return_dict_in_generate:
            return sequences
        return GenerateOutput(sequences, **arrange(readings, self.requests, self.prompts.device))


def read_call(
    terms: Terms,
    inputs: object,
    generation_config: object | None,
    options: Mapping[str, Any],
    *,
    attention_mask: object = None,
    input_ids: object = None,
    token_type_ids: object = None,
    logits_hook: LogitsHook | None = None,
    grammar: Grammar | Sequence[Grammar | None] | None = None,
    seed: int | Sequence[int] | None = None,
    cache_salt: str | Sequence[str | None] | None = None,
    rows: Rows | None = None,
) -> Call:
    """Read the arguments of `generate`, which documents them and what is raised. Warnings point at its caller's caller.

    Args:
        terms: of the decoder.
        inputs, generation_config, attention_mask, input_ids, token_type_ids, logits_hook, grammar, seed,
        cache_salt: as there.
        options: the other keyword arguments.
        rows: what hooks are shown; None if each is shown the call's own requests alone.
    """
    known = terms.row_options
    configs = generation_config if isinstance(generation_config, (list, tuple)) else [generation_config]
    if not configs:
        raise OptionError("generation_config is an empty list; pass one for each prompt, or one for all")
    eos = eos_of_each(options.get("eos_token_id"))
    if eos is not None:  # what follows reads them all as one
        options = {**options, "eos_token_id": [token for own in eos for token in own]}
    resolve = partial(
        resolve_options,
        kwargs=options,
        stored=terms.generation_config,
        vocab_size=terms.vocabulary,
        of_parts=known,
        assisted=terms.assisted,
    )
    each = [*map(resolve, configs)]  # no frame more: warnings count them
    chosen = merge_configs(each, options) if len(each) > 1 else each[0]
    prompts = parse_prompts(
        inputs,
        attention_mask,
        vocab_size=terms.vocabulary,
        capacity=terms.capacity,
        pad_token_id=chosen.prompt_pad_token_id,
        input_ids=input_ids,
        token_type_ids=token_type_ids,
    )
    if len(each) not in (1, len(prompts)):
        raise OptionError(f"generation_config is {len(each)} configs for {len(prompts)} prompts; pass one for each")
    if eos is not None and len(eos) != len(prompts):
        raise OptionError(f"eos_token_id has {len(eos)} values for {len(prompts)} prompts; pass one for each")
    of_configs = [own.eos_token_ids for own in each] if len(each) > 1 else [chosen.eos_token_ids] * len(prompts)
    ends = [*map(frozenset, eos or of_configs)]
    chosen, grammar = take_grammars(chosen, grammar, terms.vocabulary)
    _check_hook(chosen, logits_hook)
    grammars, times = grammar_of_each(grammar, len(prompts)), chosen.num_return_sequences
    prompts = prompts.repeated(times)
    of_rows = [own for own in each for _ in range(times)] if len(each) > 1 else []
    limits = limit_rows(chosen, prompts, terms.capacity, of_rows)
    given = {**chosen.of_parts, "min_new_tokens": limits.min_new_tokens[::times]}  # one for each prompt
    if "min_new_tokens" not in known:
        del given["min_new_tokens"]
        if any(limits.min_new_tokens):
            raise NotImplementedError(
                "min_new_tokens, or min_length: this artifact does not honour it; name it in row_options when you "
                "export"
            )
    own = own_options(known, given, len(prompts) // times, terms.vocabulary, asked=options)
    _check_shown(terms, own, chosen)
    draws = [bool(row.get("do_sample")) for row in own]
    if times > 1 and not all(draws):
        raise OptionError(
            f"num_return_sequences={times}, but prompt {draws.index(False)} does not sample: its sequences would "
            "all be the same; pass do_sample=True"
        )
    seeds = row_seeds(seed, len(own), times, draws=any(draws))
    texts = prompts.values.split(prompts.lengths)
    scopes = _scopes(cache_salt, len(own))
    requests = [
        Request(
            i,
            ids,
            most,
            own[i // times],
            group=i // times,
            seed=seeds[i],
            eos_token_ids=ends[i // times],
            scope=scopes[i // times],
        )
        for i, (ids, most) in enumerate(zip(texts, limits.max_new_tokens, strict=True))
    ]
    for request in requests:
        terms.check_memory(request)
    shown_rows = rows or (lambda: requests)
    masks = GrammarLogits.of(grammars, times, chosen.eos_token_ids, shown_rows)
    hooks = tuple(hook for hook in (_hook(chosen, logits_hook, shown_rows), masks) if hook is not None)
    if hooks and not terms.has_hooks:
        raise NotImplementedError(
            "logits_hook, logits_processor, prefix_allowed_tokens_fn, grammar: an artifact's step is one graph, "
            "with no place for Python in it; use optimize"
        )
    used = frozenset(name for row in own for name in row)
    looks = logits_hook is not None or not terms.is_ours or looks_at_ends(used)
    if len({*ends}) > 1 and (looks or masks):
        raise OptionError(
            "eos_token_id differs between the prompts, and a grammar, a logits_hook, a processor of your own or an "
            "option such as min_new_tokens may act on it; pass one for all, or submit each prompt to a session"
        )
    return Call(prompts, requests, chosen, hooks, masks, used, looks)


def _scopes(salt: object, count: int) -> list[bytes]:
    """Of each of so many prompts: it shares with none of another. Raises OptionError if there is no salt for each."""
    each: Sequence[object] = salt if isinstance(salt, (list, tuple)) else [salt] * count
    if len(each) != count:
        raise OptionError(f"cache_salt has {len(each)} values for {count} prompts; pass one for each")
    scopes = []
    for own in each:
        if own is not None and not isinstance(own, str):
            raise OptionError(f"cache_salt={shown(own)} is no text; pass a str, or a list with one for each prompt")
        scopes.append(b"" if own is None else b"salt " + own.encode(errors="surrogatepass"))
    return scopes


def _check_hook(chosen: GenerateOptions, own: object) -> None:
    if own is not None and not callable(own):
        raise OptionError(f"logits_hook={shown(own)} cannot be called; pass a function of a LogitContext")
    if own is not None and (chosen.logits_processor or chosen.prefix_allowed_tokens_fn is not None):
        raise OptionError("logits_hook, and logits_processor or prefix_allowed_tokens_fn: pass one of them")


def _hook(chosen: GenerateOptions, own: LogitsHook | None, rows: Rows) -> LogitsHook | None:
    """What is to be called between the halves of each step, if anything."""
    processors, allowed = chosen.logits_processor, chosen.prefix_allowed_tokens_fn
    return PythonLogits(processors, allowed, rows) if processors or allowed is not None else own


def _check_shown(terms: Terms, own: Sequence[Mapping[str, object]], chosen: GenerateOptions) -> None:
    """Refuse to tell something that would not be returned."""
    by = {spec.asked_by for spec in terms.readings.values()}
    asked = sorted({name for row in own for name in row} & by)
    if asked and not chosen.return_dict_in_generate:
        raise OptionError(
            f"{asked[0]}: the sequences alone would be returned; pass return_dict_in_generate=True as well"
        )
