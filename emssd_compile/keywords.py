"""Every option of transformers' `generate`, and what becomes of it here: none is ignored that could change a token.

The names are the fields of transformers 5's `GenerationConfig` and the arguments of its `generate`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from functools import partial

import numpy as np
from torch import Tensor, nn

from emssd_compile.drafters.assisted import HOW_IT_DRAFTS, WHO_DRAFTS
from emssd_compile.errors import OptionError
from emssd_compile.numeric import flag, integer, plain, shown

_HONOURED = """
    max_new_tokens max_length min_new_tokens min_length eos_token_id pad_token_id stop_strings tokenizer max_time
    stopping_criteria streamer return_dict_in_generate num_return_sequences logits_processor prefix_allowed_tokens_fn"""

# These change what is generated or returned, so they are refused wherever they are set.
_UNSUPPORTED = {
    "the acceptance rule of this step decodes greedily; pass do_sample=False": "do_sample",
    "decoding is greedy or by sampling; for other strategies use the model itself": """
        num_beams num_beam_groups penalty_alpha dola_layers constraints force_words_ids
        custom_generate""",
    "nothing in this step does that to the logits; for that use the model itself": """
        encoder_repetition_penalty encoder_no_repeat_ngram_size watermarking_config guidance_scale negative_prompt_ids
        negative_prompt_attention_mask token_healing""",
    "the artifact was exported without what does that to the logits; export it with row_options=[...]": """
        repetition_penalty no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias
        forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty remove_invalid_values""",
    "the artifact was exported without what tells it; export it with row_options=[...]": "output_scores output_logits",
    "a fused step hands out tokens, not its inner values; to get them run the model itself on the result": """
        output_attentions output_hidden_states""",
    "who drafts is chosen when compiling; use optimize(model, drafter=...)": "speculation_type is_assistant",
    "drafts are tokens of the model's own vocabulary; take an assistant with the same tokenizer": "assistant_tokenizer",
    "it changes what the model says; optimize(model, acceptance=...) takes rules that do, by name": """
        assistant_ensemble_weight""",
    "the compiled step takes token ids and keeps its own KV cache; pass the whole prompt as ids": """
        past_key_values cache inputs_embeds position_ids cache_position logits_to_keep encoder_outputs decoder_input_ids
        decoder_attention_mask""",
    "the step runs on one device; leave it out": "synced_gpus",
}

# These have no effect on greedy tokens. In a config they pass: it was written for other ways to run the model, too. As
# a keyword argument each is a wish that would be ignored, so it is refused. What a part of the step takes as an option
# of its own is neither unsupported nor without effect.
_WITHOUT_EFFECT = {
    "it only matters when sampling, and is none of the row_options that the artifact was exported with": """
        temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff renormalize_logits""",
    "it only matters for beam search, and decoding is greedy": "early_stopping length_penalty diversity_penalty",
    "it only matters for an assistant with another tokenizer": "assistant_lookbehind target_lookbehind",
    "layout='auto' verifies as many drafts as measured times and acceptance say": """
        num_assistant_tokens_schedule assistant_confidence_threshold""",
}

OF_ASSISTANTS = (
    *HOW_IT_DRAFTS,
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
)
"""Names of options of assisted decoding that do not by themselves ask for it."""

# The values, besides None, with which an option of the two tables asks for nothing.
_OFF: dict[str, tuple[object, ...]] = {
    name: values
    for values, names in (
        (
            (False,),
            """do_sample renormalize_logits remove_invalid_values token_healing output_scores output_logits
            output_attentions output_hidden_states use_mtp is_assistant synced_gpus early_stopping""",
        ),
        ((0,), "no_repeat_ngram_size encoder_no_repeat_ngram_size penalty_alpha diversity_penalty"),
        ((0,), "epsilon_cutoff eta_cutoff"),
        ((0, 50), "top_k"),  # no filter, and transformers' default
        ((1,), "num_beams num_beam_groups length_penalty temperature top_p typical_p"),
        ((1,), "repetition_penalty encoder_repetition_penalty guidance_scale"),
        (([],), "bad_words_ids suppress_tokens begin_suppress_tokens"),
        ((0,), "assistant_confidence_threshold"),
        (("constant",), "num_assistant_tokens_schedule"),
    )
    for name in names.split()
}


_CACHES = (
    *("dynamic", "offloaded", "static", "offloaded_static", "paged"),
    *("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
)


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """Read one id, several, or none. Raises OptionError if it is anything else."""
    is_tensor = isinstance(value, np.ndarray) or (isinstance(value, Tensor) and not value.is_meta)
    values = value.flatten().tolist() if is_tensor else value  # type: ignore[attr-defined]  # checked just above
    several = values if isinstance(values, (list, tuple, set, frozenset)) else [values]
    return tuple(integer(name, each) for each in several if each is not None)


def _settings(name: str, value: object) -> None:
    """Take a dict or an object of transformers' own."""
    if isinstance(value, (str, bool, int, float)):
        raise OptionError(f"{name}={shown(value)} is no configuration; leave it out")


def _cache_implementation(name: str, value: object) -> None:
    if value == "quantized":
        raise NotImplementedError(f"{name}='quantized' is not supported: the step keeps keys and values as they are")
    if value not in _CACHES:
        raise OptionError(f"{name}={shown(value)} is none of transformers' {list(_CACHES)}; leave it out")


# How transformers is to run the model, and from where it would start: no token depends on it, so code written for
# transformers may go on saying it. What each may be is still checked.
_HARMLESS: dict[str, Callable[[str, object], object]] = {
    **dict.fromkeys(["use_cache", "disable_compile", "low_memory", "trust_remote_code"], flag),
    **dict.fromkeys(["max_cache_len", "prefill_chunk_size"], partial(integer, least=1)),
    **dict.fromkeys(["bos_token_id", "decoder_start_token_id"], token_ids),
    **dict.fromkeys(["cache_config", "compile_config", "continuous_batching_config"], _settings),
    "cache_implementation": _cache_implementation,
}


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in table.items() for name in names.split()}


_REASON_UNSUPPORTED = _by_name(_UNSUPPORTED)
_REASON_WITHOUT_EFFECT = _by_name(_WITHOUT_EFFECT)
KNOWN = (
    *_HONOURED.split(),
    *_REASON_UNSUPPORTED,
    *_REASON_WITHOUT_EFFECT,
    *WHO_DRAFTS,
    *HOW_IT_DRAFTS,
    *_HARMLESS,
)
"""The names of all options."""
NO_OPTIONS = frozenset((*_HONOURED.split(), *_HARMLESS, "deadline", "timeout")) - {"min_new_tokens"}
"""Names that no part can give to an option of its own."""


def check_names(kwargs: Mapping[str, object], of_parts: Collection[str] = ()) -> None:
    """Refuse a name that there is not."""
    names = {*KNOWN, *of_parts}
    for name in kwargs:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "it takes the fields of transformers' GenerationConfig"
            raise OptionError(f"generate has no option {name!r}; {hint}")


def check_config(config: object | None, of_parts: Collection[str] = ()) -> None:
    """Refuse an object that sets no option at all."""
    if config is not None and not any(hasattr(config, name) for name in (*KNOWN, *of_parts)):
        kind = type(config).__name__
        raise OptionError(
            f"generation_config, a {kind}, has no field of GenerationConfig; pass options by name instead"
        )


def refuse_unsupported(
    merged: Mapping[str, object], kwargs: Mapping[str, object], of_parts: Collection[str] = ()
) -> None:
    """Refuse what would change the tokens or what is returned, wherever it is set."""
    for name, reason in _REASON_UNSUPPORTED.items():
        if name not in of_parts and not _is_off(name, merged[name]):
            off = _OFF.get(name, (None,))[0]
            origin = "" if name in kwargs else f", set in generation_config (generate({name}={off}) overrides it),"
            raise NotImplementedError(f"{name}={shown(merged[name])}{origin} is not supported: {reason}")


def refuse_without_effect(kwargs: Mapping[str, object], of_parts: Collection[str] = ()) -> None:
    """Refuse a keyword argument that asks for something that does not happen in greedy decoding."""
    for name, value in kwargs.items():
        reason = _REASON_WITHOUT_EFFECT.get(name)
        if reason is not None and name not in of_parts and not _is_off(name, value):
            raise OptionError(f"{name}={shown(value)} would have no effect: {reason}; leave it out")


def refuse_other_drafters(
    merged: Mapping[str, object], kwargs: Mapping[str, object], assisted: Mapping[str, object]
) -> None:
    """Refuse to draft in another way than the step does; `assisted` is what `Drafter.assisted` says of it."""
    asked = {**{name: merged[name] for name in WHO_DRAFTS}, **{name: kwargs.get(name) for name in HOW_IT_DRAFTS}}
    for name, value in asked.items():
        if not _is_off(name, value) and not (name in assisted and _is_same(value, assisted[name])):
            own = ", ".join(f"{key}={_brief(each)}" for key, each in assisted.items()) or "nothing of that kind"
            origin = "" if name in kwargs else f", set in generation_config (generate({name}=None) overrides it),"
            raise NotImplementedError(
                f"{name}={_brief(value)}{origin} is not supported: who drafts was chosen when compiling ({own}); leave "
                "it out, which changes no token, or use optimize(model, drafter="
                f"{(WHO_DRAFTS | HOW_IT_DRAFTS)[name]})"
            )


def _is_same(value: object, own: object) -> bool:
    value = plain(value)
    return value is own or (isinstance(value, int) and type(value) is type(own) and value == own)


def _brief(value: object) -> str:
    return f"(a {type(value).__name__})" if isinstance(value, nn.Module) else shown(value)


def check_harmless(kwargs: Mapping[str, object]) -> None:
    """Refuse a keyword argument that changes no token, but is nothing that transformers takes."""
    for name, value in kwargs.items():
        if name in _HARMLESS and value is not None:
            _HARMLESS[name](name, value)


def _is_off(name: str, value: object) -> bool:
    value = plain(value)
    # Only plain values are compared: the == of a tensor is no bool. And True is 1 to Python.
    return value is None or (
        isinstance(value, (bool, int, float, str, list))
        and any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in _OFF.get(name, ()))
    )
