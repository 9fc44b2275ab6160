"""Logits processors that other libraries make of grammars for transformers, taken for the grammar that they hold.

Called as transformers calls them, they would have a matcher for each row of a batch read a token a call, which drafts
break. What they were made of serves as well: outlines (each of its backends) and xgrammar then work as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from emssd_compile.errors import OptionError
from emssd_compile.generation import GenerateOptions
from emssd_compile.grammar import Grammar, compiled, matching
from emssd_compile.matcher import MaskMatcher

_MOST_DRAFTS = 1 << 12
"""Tokens that outlines' guides can take back: a row's drafts."""


def take_grammars(chosen: GenerateOptions, grammar: Any, vocab_size: int) -> tuple[GenerateOptions, Any]:
    """The options without the processors of grammars, and the grammar of `generate`, or what such a processor holds.

    Raises:
        OptionError: there is more than one grammar.
    """
    held = [each for each in chosen.logits_processor if _name(each) in _READERS]
    if not held:
        return chosen, grammar
    if len(held) > 1 or grammar is not None:
        raise OptionError(
            f"logits_processor: {type(held[0]).__name__} is a grammar, and there is another one; pass one of them, or "
            "a grammar that says both"
        )
    others = tuple(each for each in chosen.logits_processor if each is not held[0])
    read = _READERS[_name(held[0])]
    return replace(chosen, logits_processor=others), read(held[0], vocab_size, chosen.eos_token_ids)


def _name(processor: object) -> str:
    made = type(processor)
    return f"{made.__module__}.{made.__qualname__}"


class _Guide:
    """An automaton of outlines-core as a `Matcher`."""

    def __init__(self, index: Any) -> None:
        self._own = importlib.import_module("outlines_core").Guide(index, _MOST_DRAFTS)

    def accept_token(self, token_id: int) -> bool:
        """Read a token, if it may follow."""
        may_follow: bool = self._own.accepts_tokens([token_id])
        if may_follow:
            self._own.advance(token_id, return_tokens=False)
        return may_follow

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        self._own.rollback_state(num_tokens)

    def fill_next_token_bitmask(self, bitmask: Tensor, index: int) -> None:
        """Write what may follow."""
        line = bitmask[index]
        self._own.write_mask_into(line.data_ptr(), line.numel(), line.element_size())


def _of_outlines_core(processor: Any, vocab_size: int, ends: Sequence[int]) -> Grammar:
    return Grammar(lambda: MaskMatcher(_Guide(processor.index), vocab_size, ends), vocab_size, ends)


def _of_llguidance(processor: Any, vocab_size: int, ends: Sequence[int]) -> Grammar:
    return compiled(processor.grammar, processor.llg_tokenizer, "the grammar of the logits processor")


def _of_xgrammar(processor: Any, vocab_size: int, ends: Sequence[int]) -> Grammar | list[Grammar]:
    """One for all prompts, or one for each."""
    own = getattr(processor, "compiled_grammars", None) or [processor.compiled_grammar]
    each = [_of_compiled_grammar(grammar) for grammar in own]
    return each if len(each) > 1 else each[0]


def _of_compiled_grammar(grammar: Any) -> Grammar:
    matcher, tokens = importlib.import_module("xgrammar").GrammarMatcher, grammar.tokenizer_info
    return matching(lambda: matcher(grammar), tokens.vocab_size, tokens.stop_token_ids)


_READERS: dict[str, Callable[[Any, int, Sequence[int]], Grammar | list[Grammar]]] = {
    "outlines.backends.llguidance.LLGuidanceLogitsProcessor": _of_llguidance,
    "outlines.backends.outlines_core.OutlinesCoreLogitsProcessor": _of_outlines_core,
    "outlines.backends.xgrammar.XGrammarLogitsProcessor": _of_xgrammar,
    "xgrammar.contrib.hf.LogitsProcessor": _of_xgrammar,
}
"""By the class: their libraries need not be installed."""
