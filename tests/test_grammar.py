"""Grammars are compiled once, or refused with a reason; the documented snippet runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import emssd_compile
from emssd_compile import grammar
from emssd_compile.errors import EmssdError, GrammarError, OptionError

pytest.importorskip("transformers", reason="tokenizers are transformers'")
pytest.importorskip("llguidance", reason="grammars are carried out by llguidance")

from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "examples/demo_model/target")


def accepts(language: grammar.Grammar, tokenizer: Any, text: str) -> bool:
    """Whether the whole text is of the language."""
    matcher, ids = language.start(), tokenizer(text)["input_ids"]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


OBJECT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


class Model:
    """Quacks like a model of pydantic."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return OBJECT


@pytest.mark.parametrize("schema", [OBJECT, '{"type": "object", "required": ["n"]}', Model])
def test_a_schema_is_a_dict_or_its_text_or_a_model(tokenizer, schema):
    language = grammar.json_schema(schema, tokenizer)
    assert accepts(language, tokenizer, '{"n": 1}')
    assert not accepts(language, tokenizer, '{"m": 1}')


def test_compact_json_has_no_whitespace(tokenizer):
    language = grammar.json_schema(OBJECT, tokenizer, compact=True)
    assert accepts(language, tokenizer, '{"n":1}')
    assert not accepts(language, tokenizer, '{"n": 1}')


def test_a_regular_expression_matches_from_beginning_to_end(tokenizer):
    language = grammar.regex("[ab]+c", tokenizer)
    assert accepts(language, tokenizer, "abac")
    assert not accepts(language, tokenizer, "aba")
    assert not accepts(language, tokenizer, " abac")


@pytest.mark.parametrize("text", ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'], ids=["lark", "gbnf"])
def test_a_context_free_language(tokenizer, text):
    language = grammar.lark(text, tokenizer)
    assert accepts(language, tokenizer, "((x))")
    assert not accepts(language, tokenizer, "((x)")


def test_texts_of_one_grammar_know_nothing_of_each_other(tokenizer):
    language = grammar.regex("ab", tokenizer)
    first, second = language.start(), language.start()
    first.try_consume_tokens(tokenizer("a")["input_ids"])
    assert second.try_consume_tokens(tokenizer("b")["input_ids"]) == 0
    assert accepts(language, tokenizer, "ab")


def test_a_tokenizer_is_read_once_and_again_when_tokens_are_added():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/demo_model/target")
    first = grammar.regex("a", tokenizer)
    assert grammar._read(tokenizer) is grammar._read(tokenizer)
    tokenizer.add_tokens(["<a-new-one>"])
    assert grammar.regex("a", tokenizer).vocab_size == first.vocab_size + 1


def test_one_of_llguidance_is_taken_as_it_is(tokenizer):
    language = grammar.regex("ab", grammar._read(tokenizer))
    assert accepts(language, tokenizer, "ab")


BAD: dict[str, tuple[Any, type[EmssdError], str]] = {
    "no schema": (lambda t: grammar.json_schema(3, t), OptionError, "json_schema: 3 is no schema"),  # type: ignore[arg-type]
    "no values": (lambda t: grammar.json_schema({"a": object()}, t), GrammarError, "the JSON schema cannot be read"),
    "no pattern": (lambda t: grammar.regex(5, t), OptionError, "regex: 5 is no text"),  # type: ignore[arg-type]
    "no rules": (lambda t: grammar.lark(None, t), OptionError, "lark: None is no text"),  # type: ignore[arg-type]
    "no JSON": (lambda t: grammar.json_schema("{", t), GrammarError, "the JSON schema cannot be read"),
    "no such type": (
        lambda t: grammar.json_schema({"type": "text"}, t),
        GrammarError,
        "JSON schema cannot be compiled",
    ),
    "unknown keyword": (
        lambda t: grammar.json_schema({"type": "array", "uniqueItems": True}, t),
        GrammarError,
        "the JSON schema cannot be compiled.*uniqueItems",
    ),
    "no regex": (lambda t: grammar.regex("(", t), GrammarError, "the regular expression cannot be compiled"),
    "no grammar": (lambda t: grammar.lark("start: x", t), GrammarError, "the grammar cannot be compiled"),
    "no matcher": (
        lambda t: grammar.matching(object, 9, [0]),  # type: ignore[arg-type]
        OptionError,
        "has no accept_token, rollback, fill_next_token_bitmask",
    ),
    "no ends": (lambda t: grammar.matching(object, 9, []), OptionError, "no ids below vocab_size=9"),  # type: ignore[arg-type]
    "an end that has no bit": (lambda t: grammar.matching(object, 9, [9]), OptionError, "no ids below"),  # type: ignore[arg-type]
    "no tokenizer": (lambda t: grammar.regex("a", "gpt2"), OptionError, "cannot read the tokenizer 'gpt2'.* fast"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_compiled_is_refused(tokenizer, case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        make(tokenizer)


def test_without_the_library_the_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match=r'pip install "emssd_compile\[grammar\]"'):
        grammar.regex("a", tokenizer)


def test_the_snippet_of_the_documentation_runs(tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    fences = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/sampling.md").read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [fence for fence in fences if "grammar" in fence]
    exec(compile(code, "docs/sampling.md", "exec"), {"emssd_compile": emssd_compile})
    assert json.loads(capsys.readouterr().out).keys() == {"name", "age"}
