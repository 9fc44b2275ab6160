"""Grammars that generated text keeps to: JSON of a schema, a regular expression, any context-free language.

    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    fast.generate(prompts, grammar=emssd_compile.grammar.json_schema(schema, tokenizer))

llguidance compiles them and knows which tokens may follow; it comes with the extra `grammar`, and is imported when the
first grammar is made.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from emssd_compile.errors import GrammarError, OptionError
from emssd_compile.numeric import shown

_Known = tuple[tuple[int, int | None], Any]
_TOKENIZERS: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()  # reading one takes up to a second


class Grammar:
    """What a generated text may be, in the tokens of one tokenizer.

    Made by `json_schema`, `regex` or `lark`, once: it serves any number of prompts and calls.

    Attributes:
        vocab_size: tokens that the tokenizer knows. A model's vocabulary may be larger: what lies behind is barred.
        ends: the ids that the tokenizer ends a text with.

    Args:
        source: the grammar, as llguidance serialises it.
        tokenizer: a fast tokenizer of transformers, or an `llguidance.LLTokenizer`.
        name: what it is called in messages.

    Raises:
        GrammarError: it cannot be compiled; says why.
        OptionError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, source: str, tokenizer: Any, *, name: str = "the grammar") -> None:
        library, tokens = _library(), _read(tokenizer)
        self._start = library.LLMatcher(tokens, source, log_level=0)
        if self._start.is_error():
            raise GrammarError(f"{name} cannot be compiled: {self._start.get_error().strip()}")
        for warning in self._start.get_grammar_warnings():
            warnings.warn(f"{name}: {warning}", UserWarning, stacklevel=3)
        self.vocab_size: int = tokens.vocab_size
        self.ends: tuple[int, ...] = tuple(tokens.eos_tokens)

    def start(self) -> Any:
        """An `llguidance.LLMatcher` of its own for a text that begins."""
        return self._start.deep_copy()


def json_schema(schema: Mapping[str, Any] | str | type, tokenizer: Any, *, compact: bool = False) -> Grammar:
    """JSON that is valid under a schema.

    Args:
        schema: a JSON schema as a dict or as text, or a model of pydantic. `{"type": "object"}` is any object.
        tokenizer: the model's: a fast tokenizer of transformers, or an `llguidance.LLTokenizer`.
        compact: no whitespace between the tokens of JSON; else as much as the model writes.

    Raises:
        GrammarError: it is no schema, has a keyword that llguidance cannot enforce, or nothing is valid under it. Names
            that are no keywords of JSON schema are ignored, as it says: mind misspelt ones.
        OptionError: llguidance is not installed, or cannot read the tokenizer.
    """
    described: Any = schema.model_json_schema() if hasattr(schema, "model_json_schema") else schema
    if not isinstance(described, (Mapping, str)):
        raise OptionError(f"json_schema: {shown(schema)} is no schema; pass a dict, its JSON, or a model of pydantic")
    matcher = _library().LLMatcher
    try:
        text = described if isinstance(described, str) else json.dumps(described)
        source = matcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": not compact})
    except (TypeError, ValueError) as error:
        raise GrammarError(f"the JSON schema cannot be read: {error}") from error
    return Grammar(source, tokenizer, name="the JSON schema")


def regex(pattern: str, tokenizer: Any) -> Grammar:
    """Text that a regular expression matches, from its beginning to its end.

    Args:
        pattern: in the syntax of Rust's crate `regex`; without anchors, look-around and backreferences.
        tokenizer: as in `json_schema`.

    Raises:
        GrammarError: it cannot be compiled; says why.
        OptionError: as `json_schema`.
    """
    _check_text("regex", pattern)
    return Grammar(_library().LLMatcher.grammar_from_regex(pattern), tokenizer, name="the regular expression")


def lark(text: str, tokenizer: Any) -> Grammar:
    """Text of a context-free language.

    Args:
        text: its rules, in llguidance's dialect of Lark, or in llama.cpp's GBNF.
        tokenizer: as in `json_schema`.

    Raises:
        GrammarError: it cannot be compiled; says why.
        OptionError: as `json_schema`.
    """
    _check_text("lark", text)
    try:
        source = _library().grammar_from("grammar", text)
    except ValueError as error:
        raise GrammarError(f"the grammar cannot be read: {error}") from error
    return Grammar(source, tokenizer)


def _check_text(function: str, given: object) -> None:
    if not isinstance(given, str):
        raise OptionError(f"{function}: {shown(given)} is no text")


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise OptionError(
            f'grammars are for llguidance, which cannot be imported ({error}): pip install "emssd_compile[grammar]"'
        ) from error


def _read(tokenizer: Any) -> Any:
    """The tokenizer as an `llguidance.LLTokenizer`."""
    if isinstance(tokenizer, _library().LLTokenizer):
        return tokenizer
    try:
        state = len(tokenizer), tokenizer.eos_token_id  # tokens may have been added since
        known = _TOKENIZERS.get(tokenizer)
        if known is None or known[0] != state:
            known = _TOKENIZERS[tokenizer] = state, _converted(tokenizer)
    except (AttributeError, TypeError, ValueError) as error:
        raise OptionError(
            f"llguidance cannot read the tokenizer {shown(tokenizer)}: {error}; pass a fast tokenizer of transformers "
            "that has an EOS, or an llguidance.LLTokenizer"
        ) from error
    return known[1]


def _converted(tokenizer: Any) -> Any:
    return importlib.import_module("llguidance.hf").from_tokenizer(tokenizer)
