"""Grammars that generated text keeps to: JSON of a schema, a regular expression, any context-free language.

    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    fast.generate(prompts, grammar=emssd_compile.grammar.json_schema(schema, tokenizer))

llguidance compiles them and knows which tokens may follow; it comes with the extra `grammar`, and is imported when the
first grammar is made. `matching` takes what another library compiled.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from emssd_compile.errors import GrammarError, OptionError
from emssd_compile.matcher import MaskMatcher, Matcher
from emssd_compile.numeric import integer, shown

_Known = tuple[tuple[int, int | None], Any]
_TOKENIZERS: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()  # reading one takes up to a second


class Grammar:
    """What a generated text may be, in the tokens of one tokenizer.

    Made by `json_schema`, `regex`, `lark` or `matching`, once: it serves any number of prompts and calls.

    Args:
        start: gives a matcher of its own to each text that begins: an `llguidance.LLMatcher`, or what is called alike.
        vocab_size: tokens that the tokenizer knows. A model's vocabulary may be larger: what lies behind is barred.
        ends: the ids that the tokenizer ends a text with.
    """

    def __init__(self, start: Callable[[], Any], vocab_size: int, ends: Sequence[int]) -> None:
        self.start, self.vocab_size, self.ends = start, vocab_size, (*ends,)


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
    return compiled(source, tokenizer, "the JSON schema")


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
    return compiled(_library().LLMatcher.grammar_from_regex(pattern), tokenizer, "the regular expression")


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
    return compiled(source, tokenizer, "the grammar")


def matching(start: Callable[[], Matcher], vocab_size: int, ends: Sequence[int]) -> Grammar:
    """What a library of your own compiled, by its matchers.

    Args:
        start: gives a `Matcher` that has read nothing; called for each text that begins, and once by this.
        vocab_size: tokens that it has bits for.
        ends: the ids of which it allows one where a text may end.

    Raises:
        OptionError: what `start` gives is no matcher; or an id of `ends` has no bit, or there is none.
    """
    size = integer("vocab_size", vocab_size, least=1)
    ids = [integer("ends", token, least=0) for token in ends]
    if not ids or max(ids) >= size:
        raise OptionError(f"matching: ends={shown(ends)} are no ids below vocab_size={size}; pass those of the matcher")
    grammar = Grammar(lambda: MaskMatcher(start(), size, ids), size, ids)
    grammar.start()
    return grammar


def compiled(source: str, tokenizer: Any, name: str) -> Grammar:
    """Of a grammar as llguidance serialises it.

    Args:
        source: the grammar.
        tokenizer: as in `json_schema`.
        name: what it is called in messages.

    Raises:
        GrammarError: it cannot be compiled; says why.
        OptionError: as `json_schema`.
    """
    library, tokens = _library(), _read(tokenizer)
    start = library.LLMatcher(tokens, source, log_level=0)
    if start.is_error():
        raise GrammarError(f"{name} cannot be compiled: {start.get_error().strip()}")
    for warning in start.get_grammar_warnings():
        warnings.warn(f"{name}: {warning}", UserWarning, stacklevel=3)
    return Grammar(start.deep_copy, tokens.vocab_size, tokens.eos_tokens)


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
