"""Hugging Face's options of `generate`, resolved once before any work: each is honoured or raises, none is ignored.

An option may be set in three places. As in transformers, a keyword argument wins over the `generation_config` of the
call, which wins over the model's own stored one; `None` in a config means "not set", as a keyword it means "off".

The names are the fields of transformers 5's `GenerationConfig` and the arguments of its `generate`. transformers itself
is not needed: a config is any object with attributes of those names.
"""

from __future__ import annotations

import difflib
import operator
import reprlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from emssd_compile.errors import OptionError

DEFAULT_NEW_TOKENS = 20  # what transformers generates when nobody sets a length

StoppingCriterion = Callable[[Tensor, None], bool | Tensor]

_HONOURED = """
    max_new_tokens max_length min_new_tokens min_length eos_token_id pad_token_id stop_strings tokenizer max_time
    stopping_criteria streamer return_dict_in_generate"""

# These change what is generated or returned, so they are refused wherever they are set.
_UNSUPPORTED = {
    "only greedy decoding is supported; pass do_sample=False": "do_sample",
    "one greedy sequence is decoded per prompt; for other strategies use the model itself": """
        num_beams num_beam_groups num_return_sequences penalty_alpha dola_layers constraints force_words_ids
        custom_generate""",
    "nothing may change the logits before the argmax; for that use the model itself": """
        repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
        suppress_tokens begin_suppress_tokens sequence_bias watermarking_config guidance_scale negative_prompt_ids
        negative_prompt_attention_mask forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
        remove_invalid_values token_healing logits_processor prefix_allowed_tokens_fn""",
    "a fused step hands out tokens, not its inner values; to get them run the model itself on the result": """
        output_scores output_logits output_attentions output_hidden_states""",
    "who drafts is chosen when compiling; use optimize(model, drafter=...)": """
        assistant_model assistant_tokenizer prompt_lookup_num_tokens assistant_early_exit assistant_ensemble_weight
        speculation_type use_mtp is_assistant""",
    "the compiled step takes token ids and keeps its own KV cache; pass the whole prompt as ids": """
        past_key_values inputs_embeds position_ids cache_position logits_to_keep encoder_outputs decoder_input_ids
        decoder_attention_mask""",
    "the step runs on one device; leave it out": "synced_gpus",
}

# These have no effect on greedy tokens. In a config they pass: it was written for other ways to run the model, too. As
# a keyword argument each is a wish that would be ignored, so it is refused.
_WITHOUT_EFFECT = {
    "it only matters when sampling, and decoding is greedy": """
        temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff renormalize_logits""",
    "it only matters for beam search, and decoding is greedy": "early_stopping length_penalty diversity_penalty",
    "it only matters for transformers' assisted generation; use optimize(model, drafter=...)": """
        num_assistant_tokens num_assistant_tokens_schedule max_matching_ngram_size assistant_confidence_threshold
        assistant_lookbehind target_lookbehind""",
    "caching, chunking and compiling are chosen with optimize(model, ...)": """
        use_cache cache_implementation cache_config max_cache_len prefill_chunk_size low_memory compile_config
        disable_compile continuous_batching_config""",
    "every prompt already has its first token": "bos_token_id decoder_start_token_id",
    "no code is loaded from a model repository": "trust_remote_code",
}

# The values, besides None, with which an option of the two tables asks for nothing.
_OFF: dict[str, tuple[object, ...]] = {
    name: values
    for values, names in (
        (
            (False,),
            """do_sample renormalize_logits remove_invalid_values token_healing output_scores output_logits
            output_attentions output_hidden_states use_mtp is_assistant synced_gpus early_stopping low_memory
            trust_remote_code""",
        ),
        ((True,), "use_cache"),
        ((0,), "no_repeat_ngram_size encoder_no_repeat_ngram_size penalty_alpha diversity_penalty"),
        ((0,), "epsilon_cutoff eta_cutoff"),
        ((0, 50), "top_k"),  # no filter, and transformers' default
        ((1,), "num_beams num_beam_groups num_return_sequences length_penalty temperature top_p typical_p"),
        ((1,), "repetition_penalty encoder_repetition_penalty guidance_scale"),
        (([],), "bad_words_ids suppress_tokens begin_suppress_tokens logits_processor"),
    )
    for name in names.split()
}


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in table.items() for name in names.split()}


_REASON_UNSUPPORTED = _by_name(_UNSUPPORTED)
_REASON_WITHOUT_EFFECT = _by_name(_WITHOUT_EFFECT)
_KNOWN = (*_HONOURED.split(), *_REASON_UNSUPPORTED, *_REASON_WITHOUT_EFFECT)

# transformers lets these two replace the limits set by options; here they could only add to them.
_CRITERIA_OF_OPTIONS = {"MaxLengthCriteria": "max_length", "EosTokenCriteria": "eos_token_id"}


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
        stopping_criteria: a row ends after a token for which one of these holds, see `apply_stopping_criteria`.
        streamer: gets the tokens of the only row as they come.
        return_dict_in_generate: return a `GenerateOutput` instead of the sequences themselves.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    prompt_pad_token_id: int | None = None
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    streamer: Streamer | None = None
    return_dict_in_generate: bool = False


def saved_options(config: object) -> dict[str, Any]:
    """The options that a stored `generation_config` sets, as what JSON knows; the rest of it is not asked for here."""
    values = {name: getattr(config, name, None) for name in _KNOWN}
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str, list))}


def resolve_options(
    generation_config: object | None, kwargs: Mapping[str, object], *, stored: object | None = None, vocab_size: int
) -> GenerateOptions:
    """Merge the options of a `generate` call and check each of them.

    Args:
        generation_config: the call's own; any object with attributes named like `GenerationConfig`'s.
        kwargs: the call's keyword arguments, apart from the prompts and their masks.
        stored: the model's own config of the same kind.
        vocab_size: ids that the model can emit are below it.

    Raises:
        NotImplementedError: an option is known but not supported.
        OptionError: an unknown name, a value out of range, or a keyword argument that would have no effect.
    """
    _check_names(kwargs)
    _check_config(generation_config)
    merged = {name: _lookup(name, kwargs, generation_config, stored) for name in _KNOWN}
    _refuse_unsupported(merged, kwargs)
    _refuse_without_effect(kwargs)
    _warn_overridden(merged, kwargs)
    eos = _token_ids("eos_token_id", merged["eos_token_id"])
    if "eos_token_id" in kwargs and not all(0 <= token < vocab_size for token in eos):
        raise OptionError(f"eos_token_id={eos} has ids outside the vocabulary of {vocab_size}; pass None for no EOS")
    pad = _integer("pad_token_id", merged["pad_token_id"])
    return GenerateOptions(
        max_new_tokens=_integer("max_new_tokens", merged["max_new_tokens"], least=1),
        max_length=_integer("max_length", merged["max_length"], least=1),
        min_new_tokens=_integer("min_new_tokens", merged["min_new_tokens"], least=0),
        min_length=_integer("min_length", merged["min_length"], least=0),
        eos_token_ids=tuple(token for token in eos if 0 <= token < vocab_size),
        pad_token_id=eos[0] if pad is None and eos else pad,
        prompt_pad_token_id=None if pad in eos else pad,
        stopping_criteria=_stopping_criteria(merged),
        streamer=_streamer(merged["streamer"]),
        return_dict_in_generate=_flag("return_dict_in_generate", merged["return_dict_in_generate"]),
    )


def _lookup(name: str, kwargs: Mapping[str, object], *configs: object | None) -> object:
    if name in kwargs:
        return kwargs[name]
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _check_names(kwargs: Mapping[str, object]) -> None:
    for name in kwargs:
        if name not in _KNOWN:
            nearest = difflib.get_close_matches(name, _KNOWN, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "it takes the fields of transformers' GenerationConfig"
            raise OptionError(f"generate has no option {name!r}; {hint}")


def _check_config(config: object | None) -> None:
    if config is not None and not any(hasattr(config, name) for name in _KNOWN):
        kind = type(config).__name__
        raise OptionError(
            f"generation_config, a {kind}, has no field of GenerationConfig; pass options by name instead"
        )


def _refuse_unsupported(merged: Mapping[str, object], kwargs: Mapping[str, object]) -> None:
    for name, reason in _REASON_UNSUPPORTED.items():
        if not _is_off(name, merged[name]):
            off = _OFF.get(name, (None,))[0]
            origin = "" if name in kwargs else f", set in generation_config (generate({name}={off}) overrides it),"
            raise NotImplementedError(f"{name}={reprlib.repr(merged[name])}{origin} is not supported: {reason}")


def _refuse_without_effect(kwargs: Mapping[str, object]) -> None:
    for name, value in kwargs.items():
        reason = _REASON_WITHOUT_EFFECT.get(name)
        if reason is not None and not _is_off(name, value):
            raise OptionError(f"{name}={reprlib.repr(value)} would have no effect: {reason}; leave it out")


def _is_off(name: str, value: object) -> bool:
    # Only plain values are compared: the == of a tensor is no bool.
    return value is None or (isinstance(value, (bool, int, float, list)) and value in _OFF.get(name, ()))


def _warn_overridden(merged: Mapping[str, object], kwargs: Mapping[str, object]) -> None:
    for loser, winner in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if kwargs.get(loser) is not None and merged[winner] is not None:
            message = (
                f"{loser}={kwargs[loser]} gives way to {winner}={merged[winner]}, as in transformers; pass only one"
            )
            warnings.warn(message, UserWarning, stacklevel=4)
    if merged["max_new_tokens"] is None and merged["max_length"] is None:
        message = f"no length was asked for, so up to {DEFAULT_NEW_TOKENS} tokens are generated; pass max_new_tokens"
        warnings.warn(message, UserWarning, stacklevel=4)


def _integer(name: str, value: object, *, least: int | None = None) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # that is what is being asked
    except TypeError:
        raise OptionError(f"{name}={reprlib.repr(value)} is not an integer") from None
    if isinstance(value, bool):
        raise OptionError(f"{name}={value} is a bool; pass an integer")
    if least is not None and number < least:
        raise OptionError(f"{name}={number} is out of range; pass at least {least}")
    return number


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    """Read one id, several, or none."""
    values = value.flatten().tolist() if isinstance(value, Tensor) else value
    several = values if isinstance(values, (list, tuple, set, frozenset)) else [values]
    ids = (_integer(name, each) for each in several)
    return tuple(token for token in ids if token is not None)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | None):
        raise OptionError(f"{name}={reprlib.repr(value)} is not True or False")
    return bool(value)


def _streamer(value: object) -> Streamer | None:
    if value is not None and not (callable(getattr(value, "put", None)) and callable(getattr(value, "end", None))):
        raise OptionError(f"streamer={reprlib.repr(value)} has no put and end as transformers.TextStreamer has")
    return value  # type: ignore[return-value]  # checked by duck typing just above


def _stopping_criteria(merged: Mapping[str, object]) -> tuple[StoppingCriterion, ...]:
    given = merged["stopping_criteria"]
    if given is None:
        given = []
    if not isinstance(given, (list, tuple)) or not all(map(callable, given)):
        raise OptionError("stopping_criteria is not a list of callables; wrap a single one in a list")
    for criterion in given:
        option = _CRITERIA_OF_OPTIONS.get(type(criterion).__name__)
        if option is not None:
            raise NotImplementedError(f"stopping_criteria with {type(criterion).__name__}: pass {option} instead")
    criteria = list(given)
    if merged["max_time"] is not None:
        if not isinstance(merged["max_time"], (int, float)):
            raise OptionError(f"max_time={reprlib.repr(merged['max_time'])} is not a number of seconds")
        criteria.append(_from_transformers("max_time", "MaxTimeCriteria", max_time=merged["max_time"]))
    if merged["stop_strings"]:
        if merged["tokenizer"] is None:
            raise OptionError("stop_strings can only be found with the model's tokenizer; pass tokenizer=... as well")
        words = {"stop_strings": merged["stop_strings"], "tokenizer": merged["tokenizer"]}
        criteria.append(_from_transformers("stop_strings", "StopStringCriteria", **words))
    return tuple(criteria)


def _from_transformers(option: str, name: str, **kwargs: object) -> StoppingCriterion:
    try:
        import transformers
    except ImportError as error:
        raise OptionError(f"{option} is carried out by transformers, which is not installed; install it") from error
    criterion: StoppingCriterion = getattr(transformers, name)(**kwargs)
    return criterion
