"""Hugging Face's options of `generate`, resolved once before any work: each is honoured or raises, none is ignored.

An option may be set in three places. As in transformers, a keyword argument wins over the `generation_config` of the
call, which wins over the model's own stored one; `None` in a config means "not set", as a keyword it means "off".

Which options there are says `keywords`. transformers itself is not needed: a config is any object with attributes of
those names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from emssd_compile import keywords
from emssd_compile.errors import OptionError
from emssd_compile.numeric import INT64_MIN, flag, integer, seconds, shown
from emssd_compile.python_logits import AllowedTokens, HFProcessor
from emssd_compile.step.options import RowOption

_BY_ROW = ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_ids", "of_parts")
"""What each row may set."""
_SPREAD = 0x9E3779B97F4A7C15  # odd: seeds of neighbouring rows are far from those of neighbouring seeds
DEFAULT_NEW_TOKENS = 20  # what transformers generates when nobody sets a length

StoppingCriterion = Callable[[Tensor, None], bool | Tensor]

# transformers lets these two replace the limits set by options; here they could only add to them.
_CRITERIA_OF_OPTIONS = {"MaxLengthCriteria": "max_length", "EosTokenCriteria": "eos_token_id"}
# These judge a row by nothing but its own text or the clock, so each row can be asked as soon as it has a new token.
_ROW_CRITERIA = {"StopStringCriteria": "stop_strings", "MaxTimeCriteria": "max_time"}


class Streamer(Protocol):
    """Receives the prompt and then each new token; transformers' `BaseStreamer` is one."""

    def put(self, value: Tensor) -> None:
        """Take int64 ids on the CPU: first the prompt as given [1, S], then each new token [1]."""

    def end(self) -> None:
        """Know that no more tokens follow."""


@dataclass(frozen=True)
class GenerateOptions:
    """What one `generate` call asked for, apart from its prompts.

    Attributes:
        max_new_tokens: most tokens that a row may emit; wins over `max_length`.
        max_length: the same, counted with the prompt as given: with the padding of a tensor, as Hugging Face does.
        min_new_tokens: a row emits so many tokens before an EOS may be chosen; wins over `min_length`.
        min_length: the same, counted with the prompt as given.
        eos_token_ids: a row ends after emitting one of these; ids that the vocabulary does not hold are left out.
        pad_token_id: follows the rows of a returned tensor that ended early. Default: the first configured EOS.
        prompt_pad_token_id: marks padding in a tensor without `attention_mask`: the configured pad, if it is no EOS.
        stopping_criteria: a row ends after a token for which one of these holds; asked with the whole batch.
        row_criteria: the same, asked with one row at a time.
        max_time: seconds after which every row ends with its next token.
        streamer: gets the tokens of the only row as they come.
        return_dict_in_generate: return a `GenerateOutput` instead of the sequences themselves.
        num_return_sequences: how many continuations each prompt gets.
        logits_processor: Python that changes logits.
        prefix_allowed_tokens_fn: Python that says which ids may follow a text.
        of_parts: what is set for the parts of the step, by name: a value, or a list with one for each row.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    prompt_pad_token_id: int | None = None
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    row_criteria: tuple[StoppingCriterion, ...] = ()
    max_time: float | None = None
    streamer: Streamer | None = None
    return_dict_in_generate: bool = False
    num_return_sequences: int = 1
    logits_processor: tuple[HFProcessor, ...] = ()
    prefix_allowed_tokens_fn: AllowedTokens | None = None
    of_parts: Mapping[str, object] = field(default_factory=dict)


def saved_options(config: object, of_parts: Collection[str] = ()) -> dict[str, Any]:
    """The options that a stored `generation_config` sets, as what JSON knows; the rest of it is not asked for here.

    Args:
        config: any object with attributes of their names.
        of_parts: names of options of parts.
    """
    values = {name: _as_json(getattr(config, name, None)) for name in (*keywords.KNOWN, *of_parts)}
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str, list))}


def _as_json(value: object) -> object:
    """Tuples, tensors and dicts as lists, the latter of pairs: options that take one take the other, too."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        value = [*value.items()]
    return [_as_json(each) for each in value] if isinstance(value, (list, tuple)) else value


def own_options(
    known: Mapping[str, RowOption],
    given: Mapping[str, object],
    rows: int,
    vocabulary: int,
    asked: Collection[str] = (),
) -> list[dict[str, float | Tensor]]:
    """What each row sets for the parts of the step, without what is as it would be anyway.

    Args:
        known: the options of the parts.
        given: for some of them a value, or a list with one for each row; for a table, its value for all rows.
        rows: how many there are.
        vocabulary: V.
        asked: those that were passed by name, and are to have an effect.

    Raises:
        OptionError: a value is out of range, a list has not one for each row, or what was asked for has no effect.
    """
    of_rows: list[dict[str, float | Tensor]] = [{} for _ in range(rows)]
    for name in sorted(known, key=lambda name: bool(known[name].needs)):  # what others need comes before them
        option = known[name]
        values = _value_of_each(name, option, given.get(name), rows)
        has_effect = [not option.needs or bool(row.get(option.needs)) for row in of_rows]
        if name in asked and not any(has_effect):
            read = [option.read(name, value, vocabulary) for value in values if value is not None]
            if any(not option.is_default(value) and value != option.implied for value in read):
                raise OptionError(
                    f"{name}={shown(read[0])} would have no effect without {option.needs}=True; pass that, too, or "
                    "leave it out"
                )
        for row, value, is_on in zip(of_rows, values, has_effect, strict=True):
            if is_on and value is not None and not option.is_default(one := option.read(name, value, vocabulary)):
                row[name] = one
            elif is_on and value is None and option.needs and option.implied is not None:
                row[name] = option.implied
    return of_rows


class PerRow(tuple[object, ...]):
    """A value for each row, of tables, too; None where there is none."""


def merge_configs(each: Sequence[GenerateOptions], kwargs: Collection[str]) -> GenerateOptions:
    """One set of options for rows that were given configs of their own; a row ends at its own EOS, and at no other.

    Args:
        each: what was resolved for each row.
        kwargs: names of what was passed by name, which holds for all of them.

    Raises:
        OptionError: the configs differ in something that is the same for all rows of a call.
    """
    first = each[0]
    for number, other in enumerate(each):
        for name in (name for name in vars(first) if name not in _BY_ROW):
            if _compared(other, name) != _compared(first, name):
                raise OptionError(
                    f"generation_config: number {number} has another {name} than number 0; it is the same for all "
                    "prompts of a call, so decode them in calls of their own"
                )
    of_parts = {
        name: first.of_parts[name] if name in kwargs else PerRow(other.of_parts.get(name) for other in each)
        for name in {name for other in each for name in other.of_parts}
    }
    eos = dict.fromkeys(token for other in each for token in other.eos_token_ids)
    return replace(first, eos_token_ids=(*eos,), of_parts=of_parts)


def _compared(options: GenerateOptions, name: str) -> object:
    """What tells whether two configs say the same: of criteria their stop strings, of a pad that is an EOS nothing."""
    value = getattr(options, name)
    if name == "pad_token_id" and value in options.eos_token_ids:
        return None
    return tuple(getattr(each, "stop_strings", each) for each in value) if isinstance(value, tuple) else value


def _value_of_each(name: str, option: RowOption, value: object, rows: int) -> list[object]:
    """What each row is given; None where nothing is."""
    if isinstance(value, PerRow):
        return list(value)
    if option.is_table or not isinstance(value, (list, tuple)):
        return [value] * rows
    if len(value) != rows:
        raise OptionError(f"{name} has {len(value)} values for {rows} prompts; pass one for each, or one for all")
    return list(value)


def honoured_options(
    known: Mapping[str, RowOption], wanted: Collection[str] | None, stored: object, vocabulary: int
) -> set[str]:
    """The options of parts that an artifact is to honour.

    Args:
        known: all that there are.
        wanted: those that requests may set; None for `min_new_tokens` and what `stored` sets.
        stored: the model's own config, if it has one.
        vocabulary: V.

    Raises:
        OptionError: there is no option of that name, or what `stored` sets makes no sense.
    """
    if wanted is None:
        configured = {name: value for name in known if (value := getattr(stored, name, None)) is not None}
        wanted = {"min_new_tokens", *own_options(known, configured, 1, vocabulary)[0]} & known.keys()
    if isinstance(wanted, str) or not isinstance(wanted, Collection):
        raise OptionError(f"row_options={shown(wanted)} is no list of names; pass row_options=[...]")
    for name in wanted:
        if name not in known:
            raise OptionError(f"row_options: there is no {shown(name)}; choose from {', '.join(sorted(known))}")
    needed = {*wanted, *(known[name].needs for name in wanted if known[name].needs)}
    return needed | {name for name, option in known.items() if option.needs in needed and option.implied is not None}


def row_seeds(seed: object, prompts: int, sequences: int, *, draws: bool) -> list[int]:
    """A seed of 64 bits for each row: one for each sequence of each prompt.

    Args:
        seed: one for each prompt, which is that of its first sequence; or one for all, which is that of the first row;
            the others get seeds made of it. None for one from torch's generator.
        prompts: how many there are.
        sequences: how many continuations each of them gets.
        draws: whether any row draws; where none does, torch's generator is left as it is.

    Raises:
        OptionError: a seed is no integer of 64 bits, or there is not one for each row.
    """
    if isinstance(seed, (list, tuple)):
        if len(seed) != prompts:
            raise OptionError(f"seed has {len(seed)} values for {prompts} prompts; pass one for each, or one for all")
        return [own for each in seed for own in _spread(integer("seed", each), sequences)]
    if seed is not None:
        first = integer("seed", seed)
    else:
        first = int(torch.randint(INT64_MIN, -INT64_MIN - 1, ())) if draws else 0
    return _spread(first, prompts * sequences)


def _spread(first: int, count: int) -> list[int]:
    return [nth_seed(first, row) for row in range(count)]


def nth_seed(first: int, row: int) -> int:
    """The seed of a row, where `first` is that of the first."""
    return (first + row * _SPREAD - INT64_MIN) % (1 << 64) + INT64_MIN


def resolve_options(
    generation_config: object | None,
    kwargs: Mapping[str, object],
    *,
    stored: object | None = None,
    vocab_size: int,
    of_parts: Collection[str] = (),
    assisted: Mapping[str, object] = MappingProxyType({}),
) -> GenerateOptions:
    """Merge the options of a `generate` call and check each of them.

    Args:
        generation_config: the call's own; any object with attributes named like `GenerationConfig`'s.
        kwargs: the call's keyword arguments, apart from the prompts and their masks.
        stored: the model's own config of the same kind.
        vocab_size: ids that the model can emit are below it.
        of_parts: what the parts of the step take as options of their own.
        assisted: options that say what the drafter of the step does anyway, and their values.

    Raises:
        NotImplementedError: an option is known but not supported.
        OptionError: an unknown name, a value out of range, or a keyword argument that would have no effect.
    """
    keywords.check_names(kwargs, of_parts)
    keywords.check_config(generation_config, of_parts)
    merged = {name: _lookup(name, kwargs, generation_config, stored) for name in {*keywords.KNOWN, *of_parts}}
    keywords.refuse_unsupported(merged, kwargs, of_parts)
    keywords.refuse_without_effect(kwargs, of_parts)
    keywords.refuse_other_drafters(merged, kwargs, assisted)
    keywords.check_harmless(kwargs)
    eos = keywords.token_ids("eos_token_id", merged["eos_token_id"])
    if "eos_token_id" in kwargs and not all(0 <= token < vocab_size for token in eos):
        raise OptionError(f"eos_token_id={eos} has ids outside the vocabulary of {vocab_size}; pass None for no EOS")
    pad = _optional("pad_token_id", merged["pad_token_id"])
    of_batch, of_rows = _stopping_criteria(merged)
    limit, as_dict = merged["max_time"], merged["return_dict_in_generate"]
    options = GenerateOptions(
        max_new_tokens=_optional("max_new_tokens", merged["max_new_tokens"], least=1),
        max_length=_optional("max_length", merged["max_length"], least=1),
        min_new_tokens=_optional("min_new_tokens", merged["min_new_tokens"], least=0),
        min_length=_optional("min_length", merged["min_length"], least=0),
        eos_token_ids=tuple(token for token in eos if 0 <= token < vocab_size),
        pad_token_id=eos[0] if pad is None and eos else pad,
        prompt_pad_token_id=None if pad in eos else pad,
        stopping_criteria=of_batch,
        row_criteria=of_rows,
        max_time=None if limit is None else seconds("max_time", limit),
        streamer=_streamer(merged["streamer"]),
        return_dict_in_generate=as_dict is not None and flag("return_dict_in_generate", as_dict),
        num_return_sequences=_optional("num_return_sequences", merged["num_return_sequences"], least=1) or 1,
        logits_processor=_callables("logits_processor", merged["logits_processor"]),
        prefix_allowed_tokens_fn=_callable("prefix_allowed_tokens_fn", merged["prefix_allowed_tokens_fn"]),
        of_parts={name: merged[name] for name in of_parts if merged[name] is not None},
    )
    _warn_overridden(options, kwargs)
    return options


def eos_of_each(value: object) -> list[tuple[int, ...]] | None:
    """An `eos_token_id` with a list of ids for each prompt, or one id or None instead; None if it is for all of them.

    Raises:
        OptionError: it holds something else.
    """
    rows: list[Any] = [*value] if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 1 else []  # type: ignore[misc]
    if not any(isinstance(each, (list, tuple)) or getattr(each, "ndim", 0) > 0 for each in rows):
        return None
    return [keywords.token_ids("eos_token_id", each) for each in rows]


def _lookup(name: str, kwargs: Mapping[str, object], *configs: object | None) -> object:
    if name in kwargs:
        return kwargs[name]
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _warn_overridden(options: GenerateOptions, kwargs: Mapping[str, object]) -> None:
    for loser, winner in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        lost, won = getattr(options, loser), getattr(options, winner)
        if kwargs.get(loser) is not None and won is not None:
            message = f"{loser}={lost} gives way to {winner}={won}, as in transformers; pass only one"
            warnings.warn(message, UserWarning, stacklevel=5)
    if options.max_new_tokens is None and options.max_length is None:
        message = f"no length was asked for, so up to {DEFAULT_NEW_TOKENS} tokens are generated; pass max_new_tokens"
        warnings.warn(message, UserWarning, stacklevel=5)


def _optional(name: str, value: object, *, least: int = INT64_MIN) -> int | None:
    return None if value is None else integer(name, value, least=least)


def _streamer(value: object) -> Streamer | None:
    if value is not None and not (callable(getattr(value, "put", None)) and callable(getattr(value, "end", None))):
        raise OptionError(f"streamer={shown(value)} has no put and end as transformers.TextStreamer has")
    return value  # type: ignore[return-value]  # checked by duck typing just above


def _stopping_criteria(
    merged: Mapping[str, object],
) -> tuple[tuple[StoppingCriterion, ...], tuple[StoppingCriterion, ...]]:
    """Those that are asked with the batch, and those that are asked row by row."""
    given = merged["stopping_criteria"]
    given = _callables("stopping_criteria", given)
    of_batch: list[StoppingCriterion] = []
    of_rows: list[StoppingCriterion] = []
    for criterion in given:
        name = type(criterion).__name__
        if name in _CRITERIA_OF_OPTIONS:
            raise NotImplementedError(f"stopping_criteria with {name}: pass {_CRITERIA_OF_OPTIONS[name]} instead")
        option = _ROW_CRITERIA.get(name)
        if option is not None and merged[option] is not None:
            raise OptionError(f"stopping_criteria with {name}, and {option}: each is the other's limit; pass one")
        (of_batch if option is None else of_rows).append(criterion)
    stop_strings = _stop_strings(merged["stop_strings"], merged["tokenizer"])
    return tuple(of_batch), (*of_rows, *stop_strings)


def _callables(name: str, given: object) -> tuple[Any, ...]:
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)) or not all(map(callable, given)):
        raise OptionError(f"{name} is not a list of callables; wrap a single one in a list")
    return tuple(given)


def _callable(name: str, given: object) -> Any:
    if given is not None and not callable(given):
        raise OptionError(f"{name}={shown(given)} cannot be called; pass a function")
    return given


def _stop_strings(given: object, tokenizer: object) -> tuple[StoppingCriterion, ...]:
    """What ends a row at one of the strings, if there are any."""
    if given is None or given == []:
        return ()
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, (list, tuple)) or not all(isinstance(each, str) and each for each in strings):
        raise OptionError(f"stop_strings={shown(given)} is no text and no list of texts")
    if tokenizer is None:
        raise OptionError("stop_strings can only be found with the model's tokenizer; pass tokenizer=... as well")
    try:
        from transformers import StopStringCriteria
    except ImportError as error:
        raise OptionError("stop_strings is carried out by transformers, which is not installed; install it") from error
    try:
        return (StopStringCriteria(stop_strings=list(strings), tokenizer=tokenizer),)
    except (AttributeError, TypeError, ValueError) as error:
        raise OptionError(f"stop_strings cannot be found with {shown(tokenizer)}: {error}") from error
