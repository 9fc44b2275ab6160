"""Fields of OpenAI's API that this server does not support: refused by name, unless their value asks for nothing."""

from __future__ import annotations

from typing import Any

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # there are no tools to be called
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""By name: the values that ask for nothing."""

_OF_THE_CLIENT = frozenset({"safety_identifier", "user"})
"""They tell OpenAI who asks, and change no answer."""


def without_harmless(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request, but for those that are null or ask for nothing."""
    return {
        name: value
        for name, value in given.items()
        if value is not None
        and name not in _OF_THE_CLIENT
        and not any(value == nothing for nothing in UNSUPPORTED.get(name, ()))
    }


def refusal(name: str) -> str:
    """What is said of a field that no request may have."""
    return "this server does not support it; leave it out" if name in UNSUPPORTED else "there is no such field"
