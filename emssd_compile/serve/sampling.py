"""Options of `generate` from the fields of a request."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from emssd_compile.errors import OptionError
from emssd_compile.serve.schemas import SamplingBody

_DRAWING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}  # what OpenAI and vLLM do where nobody says
_OTHERS = ("repetition_penalty", "presence_penalty", "frequency_penalty")

_FORMS: dict[str, dict[str, Any]] = {
    "temperature": {"do_sample": True},
    "top_p": {"do_sample": True, "top_p": 0.5},
    "top_k": {"do_sample": True, "top_k": 1},
    "min_p": {"do_sample": True, "min_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "presence_penalty": {"presence_penalty": 1.0},
    "frequency_penalty": {"frequency_penalty": 1.0},
    "logit_bias": {"logit_bias": {0: 1.0}},
    "logprobs": {"logprobs": True, "top_logprobs": 1},
}
_HOOKED = "response_format"
WARMED = (*_FORMS, _HOOKED)
"""Fields for which a form of the step can be compiled beforehand."""


def row_options(body: SamplingBody, defaults: object, known: Collection[str] = tuple(_DRAWING)) -> dict[str, Any]:
    """What a request says of the choice of tokens.

    Args:
        body: the request.
        defaults: the model's `generation_config`, if it has one.
        known: what steps can do; an artifact lacks what nobody was to ask for, and is not told to leave it.
    """
    drawing = {}
    for name, fallback in _DRAWING.items():
        stored = getattr(defaults, name, None)
        drawing[name] = next(each for each in (getattr(body, name), stored, fallback) if each is not None)
    drawing["top_k"] = max(drawing["top_k"], 0)  # vLLM's -1 is off, too
    options: dict[str, Any] = {name: value for name in _OTHERS if (value := getattr(body, name)) is not None}
    if body.logit_bias:
        options["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    if drawing["temperature"] == 0:  # the likeliest token, which no filter bars
        return {"do_sample": False, **options}
    asked = {name: value for name, value in drawing.items() if name in known or value != _DRAWING[name]}
    return {"do_sample": True, **asked, **options}


def warmed_options(fields: Collection[str]) -> tuple[dict[str, Any], bool]:
    """The options that stand for these fields of requests, and whether one of them takes a step in two halves.

    Raises:
        OptionError: there is nothing to be compiled for a field.
    """
    unknown = [field for field in fields if field not in WARMED]
    if unknown:
        raise OptionError(f"warmup: nothing is compiled for {unknown[0]!r}; choose from {', '.join(WARMED)}")
    options: dict[str, Any] = {}
    for field in fields:
        options |= _FORMS.get(field, {})
    return options, _HOOKED in fields
