"""What outlines and xgrammar make for transformers gives the tokens that transformers gives, under speculation."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

pytest.importorskip("outlines", reason="its generators are what is tested")
pytest.importorskip("llguidance", reason="it carries out one kind of them")

import outlines

import emssd_compile
from emssd_compile.errors import OptionError
from emssd_compile.grammar import regex
from emssd_compile.optimized_model import OptimizedModel
from tests.serve.servers import LENGTH, ids_of, tokenizer, toy

PATTERN = r'\{"name": "[a-z]{1,9}", "age": [0-9]{1,4}\}'
EXAMPLE = '{"name": "on", "age": 11}'
PROMPTS = [EXAMPLE * 2, "the cat " + EXAMPLE]
NEW: dict[str, Any] = {"max_new_tokens": 40}
BACKENDS = ["outlines_core", "llguidance", "xgrammar"]


@functools.cache
def _fast() -> OptimizedModel:
    return emssd_compile.optimize(
        toy(), "prompt-lookup", max_batch=2, max_length=LENGTH, backend="eager", layout="packed"
    )


@functools.cache
def _no_chat() -> Any:
    """The tokenizer, which outlines would otherwise ask for what a user says."""
    plain = copy.deepcopy(tokenizer())
    plain.chat_template = None
    return plain


def _generator(model: Any, backend: str) -> Any:
    pytest.importorskip(backend, reason="outlines leaves the work to it")
    wrapped = outlines.from_transformers(model, _no_chat())
    return outlines.Generator(wrapped, outlines.regex(PATTERN), backend=backend)


@functools.cache
def _plain(backend: str) -> list[str]:
    generator = _generator(toy(), backend)
    with torch.compiler.set_stance("force_eager"):  # outlines would compile how it masks
        found: list[str] = generator.batch(PROMPTS, do_sample=False, **NEW)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_generators_of_outlines_give_what_they_give_with_the_model(backend):
    ours = _generator(_fast(), backend)
    _fast().stats.reset()
    assert ours.batch(PROMPTS, **NEW) == _plain(backend)
    assert [ours(prompt, **NEW) for prompt in PROMPTS] == _plain(backend), "one after the other, and again"
    stats = _fast().stats
    assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens, "some are taken back"


def test_requests_of_a_session_take_them_too():
    with _fast().session() as session:
        streams = [
            session.submit(
                ids_of(prompt), logits_processor=[_generator(toy(), "outlines_core").logits_processor], **NEW
            )
            for prompt in PROMPTS
        ]
        new = [tokenizer().decode([*stream], skip_special_tokens=True) for stream in streams]
    assert new == _plain("outlines_core")


def test_those_of_xgrammar_have_one_grammar_or_one_for_each_prompt():
    xgrammar = pytest.importorskip("xgrammar", reason="these are its own")
    hf = pytest.importorskip("xgrammar.contrib.hf")
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer(), vocab_size=len(tokenizer()))
    made = [xgrammar.GrammarCompiler(info).compile_regex(pattern) for pattern in (PATTERN, "on|the cat")]
    prompts = [ids_of(prompt) for prompt in PROMPTS]
    for grammars in (made[:1], made):
        each = grammars * (2 // len(grammars))
        expected = [
            toy()
            .generate(
                torch.tensor([ids]),
                logits_processor=[hf.LogitsProcessor(grammar)],
                do_sample=False,
                **NEW,
            )[0]
            .tolist()
            for ids, grammar in zip(prompts, each, strict=True)
        ]
        assert _fast().generate(prompts, logits_processor=[hf.LogitsProcessor(grammars)], **NEW) == expected


def test_two_grammars_are_refused():
    held = _generator(toy(), "outlines_core").logits_processor
    for given in (
        {"logits_processor": [held, held]},
        {"logits_processor": [held], "grammar": regex("a", tokenizer())},
    ):
        with pytest.raises(OptionError, match="OutlinesCoreLogitsProcessor is a grammar, and there is another"):
            _fast().generate([[5, 6]], **given, **NEW)
