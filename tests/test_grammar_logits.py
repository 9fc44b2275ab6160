"""Structured output under speculation: always valid, and the tokens of decoding without drafts under the same masks."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the tokenizer is one of transformers")
pytest.importorskip("llguidance", reason="grammars are carried out by llguidance")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import emssd_compile
from emssd_compile.drafters import DraftModel, PromptLookup
from emssd_compile.errors import EmssdError, GrammarError, OptionError
from emssd_compile.grammar import Grammar, json_schema, matching, regex
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.step.randomness import gumbels
from tests.exactness.drafters import Oracle, OracleTree
from tests.export.subjects import WIDTH, Small


def _train() -> Any:
    """A tokenizer of all bytes and some words: small, so that decoding takes little time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    words = '{"name":"ann","age":1,"ok":true} ["red","green","blue"] {"in":{"name":"bob","ok":false}} "none"'
    tokenizer.train_from_iterator([words] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZER = _train()
EOS, VOCABULARY, CAPACITY, NEW = 0, len(TOKENIZER) + 4, 96, 60  # the model has more ids than the tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}
COLOURS = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4}
EITHER = {"anyOf": [{"const": "none"}, {"type": "object", "properties": {"in": PERSON}, "required": ["in"],
                                        "additionalProperties": False}]}  # fmt: skip


def _is_person(value: Any) -> bool:
    return (
        value.keys() == {"name", "age", "ok"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and type(value["ok"]) is bool
    )


def _are_colours(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 4 and {*value} <= {"red", "green", "blue"}


def _is_either(value: Any) -> bool:
    return value == "none" or (value.keys() == {"in"} and _is_person(value["in"]))


VALID: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (PERSON, _is_person),
    (COLOURS, _are_colours),
    (EITHER, _is_either),
]
GRAMMARS = [json_schema(schema, TOKENIZER, compact=True) for schema, _ in VALID]
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("def f(", "x = [1, 2, 3]\ny = [1, 2", "a", "# red, green", "{")]
OF_EACH = [GRAMMARS[0], None, GRAMMARS[1], GRAMMARS[2], GRAMMARS[0]]
SHORT = regex("[ab]c", TOKENIZER)
SEEDS = [5, None, 7, None, 9]  # of those that sample
OPTIONS: dict[str, Any] = {
    "grammar": OF_EACH,
    "max_new_tokens": NEW,
    "eos_token_id": EOS,
    "do_sample": [seed is not None for seed in SEEDS],
    "seed": [seed or 0 for seed in SEEDS],
    "top_k": 0,
}


class _OfAnotherLibrary:
    """A matcher by the names and the form of mask that are common to libraries."""

    def __init__(self, grammar: Grammar) -> None:
        self._matcher = grammar.start()

    def accept_token(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        self._matcher.rollback(count)

    def fill_next_token_bitmask(self, bitmask: Tensor, index: int) -> None:
        bitmask[index] = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)


class _OfNothing(_OfAnotherLibrary):
    def fill_next_token_bitmask(self, bitmask: Tensor, index: int) -> None:
        bitmask[index] = 0


def _by_another(grammar: Grammar) -> Grammar:
    return matching(lambda: _OfAnotherLibrary(grammar), grammar.vocab_size, grammar.ends)


class Toy(Small):
    """Writes rubbish: random weights, over the vocabulary of the tokenizer or another size."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding(vocabulary, WIDTH, _weight=torch.randn(vocabulary, WIDTH, generator=generator))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(vocabulary, WIDTH, generator=generator) / 2)
        self.eval()


def _bits(grammar: Grammar, new: Sequence[int]) -> Tensor:
    """Bool `[V]`: what a matcher that reads the whole text anew allows behind it."""
    matcher = grammar.start()
    assert matcher.try_consume_tokens(list(new)) == len(new)
    octets = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(8)) & 1
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[: grammar.vocab_size] = bits.flatten()[: grammar.vocab_size].bool()
    allowed[EOS] = matcher.is_accepting()
    return allowed


@torch.no_grad()
def _alone(
    prompt: list[int], grammar: Grammar | None, seed: int | None, process: Any = lambda scores: scores
) -> list[int]:
    """One prompt and one token at a time."""
    model, text = Toy(), list(prompt)
    for _ in range(NEW):
        scores = process(model(torch.tensor([text]))[0, -1])
        if grammar is not None:
            scores = scores.masked_fill(~_bits(grammar, text[len(prompt) :]), -torch.inf)
        if seed is not None:
            scores = scores + gumbels(torch.tensor(seed), torch.tensor(len(text)), torch.arange(VOCABULARY))
        text.append(int(scores.argmax()))
        if text[-1] == EOS:
            break
    return text


@functools.cache
def _expected() -> list[list[int]]:
    return [_alone(*each) for each in zip(PROMPTS, OF_EACH, SEEDS, strict=True)]


def _optimize(drafter: str | nn.Module, model: nn.Module | None = None, **options: Any) -> OptimizedModel:
    options = {"backend": "eager", "layout": "packed", "max_batch": 3, "max_length": CAPACITY, **options}
    return emssd_compile.optimize(model or Toy(), drafter, **options)


def _drafter(name: str) -> str | nn.Module:
    texts = [*_expected(), *(_alone(prompt, SHORT, None) for prompt in PROMPTS)]
    made: dict[str, Callable[[], str | nn.Module]] = {
        "lookup": lambda: "prompt-lookup",
        "draft-model": lambda: DraftModel(Toy(), 3),  # the target itself, which knows no grammar
        "draft-tree": lambda: DraftModel(Toy(), tree=(3, 2)),
        "right": lambda: Oracle(texts, CAPACITY, 4, wrong_of_seven=0),
        "sometimes-wrong": lambda: Oracle(texts, CAPACITY, 4, wrong_of_seven=2, ragged=True),
        "random-tree": lambda: OracleTree(Oracle(texts, CAPACITY, 3, wrong_of_seven=1), 9),
    }
    return made[name]()


@functools.cache
def _fast(name: str) -> OptimizedModel:
    return _optimize(_drafter(name))


def _new(row: Sequence[int], prompt: Sequence[int]) -> str:
    """What a row spells behind its prompt; it ends with an EOS."""
    assert row[-1] == EOS
    return TOKENIZER.decode(row[len(prompt) : -1])


@pytest.mark.parametrize("name", ["lookup", "draft-model", "draft-tree", "sometimes-wrong", "random-tree"])
def test_tokens_are_those_of_the_masks_without_drafts(name):
    """Rows with a grammar and without, drawn and greedy, more of them than are decided together."""
    found = _fast(name).generate(PROMPTS, **OPTIONS)
    assert found == _expected()
    for row, prompt, grammar in zip(found, PROMPTS, OF_EACH, strict=True):
        if grammar is not None:
            assert VALID[GRAMMARS.index(grammar)][1](json.loads(_new(row, prompt)))


@pytest.mark.parametrize("name", ["draft-model", "random-tree"])
def test_tokens_are_the_same_by_matchers_of_another_library(name):
    others = [grammar and _by_another(grammar) for grammar in OF_EACH]
    assert _fast(name).generate(PROMPTS, **OPTIONS | {"grammar": others}) == _expected()
    mixed = [*others[:3], *OF_EACH[3:]]
    assert _fast(name).generate(PROMPTS, **OPTIONS | {"grammar": mixed}) == _expected()


def test_a_host_that_is_a_step_behind_gives_the_same(monkeypatch):
    """As on a GPU: a step is launched before the report of the last one is read."""
    fast = _fast("random-tree")
    monkeypatch.setattr(fast._engine, "lag", 1)
    assert fast.generate(PROMPTS, **OPTIONS) == _expected()


@pytest.mark.parametrize("number", range(len(VALID)))
def test_json_of_any_seed_is_valid(number):
    """Each sequence of each prompt has a text of its own."""
    found = _fast("lookup").generate(
        PROMPTS[:4], max_new_tokens=NEW, grammar=GRAMMARS[number], eos_token_id=EOS, do_sample=True, seed=number,
        num_return_sequences=4,
    )  # fmt: skip
    texts = [_new(row, PROMPTS[i // 4]) for i, row in enumerate(found)]
    assert all(VALID[number][1](json.loads(text)) for text in texts)
    assert len({*texts}) > 2


def test_drafts_are_accepted_inside():
    fast = _fast("right")
    fast.stats.reset()
    fast.generate(PROMPTS, **OPTIONS)
    assert fast.stats.mean_acceptance_length > 4  # of at most 5


def test_behind_logits_processors_and_hooks():
    def prefer(scores: Tensor) -> Tensor:
        return scores + torch.arange(scores.shape[-1]) % 7

    expected = [_alone(*each, prefer) for each in zip(PROMPTS, OF_EACH, SEEDS, strict=True)]
    assert expected != _expected()
    ways: list[dict[str, Any]] = [
        {"logits_processor": [lambda ids, scores: prefer(scores)]},
        {"logits_hook": lambda context: prefer(context.logits)},
    ]
    for way in ways:
        assert _fast("random-tree").generate(PROMPTS, **OPTIONS, **way) == expected


def test_inductor():
    options: dict[str, Any] = {"grammar": OF_EACH, "max_new_tokens": NEW, "eos_token_id": EOS}
    expected = _fast("right").generate(PROMPTS, **options)
    assert _optimize(PromptLookup(2), backend="inductor").generate(PROMPTS, **options) == expected


def test_prompts_without_a_grammar_take_the_step_that_is_not_cut():
    fast = _fast("lookup")
    found = fast.generate(PROMPTS, max_new_tokens=NEW, grammar=[None] * len(PROMPTS), eos_token_id=EOS)
    assert not fast._halves
    assert found == fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=EOS)


@pytest.mark.parametrize("eos", [17, [17, EOS], VOCABULARY - 1, TOKENIZER("a")["input_ids"][0]])
def test_each_eos_of_the_call_ends_a_complete_text_and_no_other(eos):
    """Whatever it is to the tokenizer: one that is text to it ends nothing that is not complete."""
    ends = eos if isinstance(eos, list) else [eos]
    pattern = "[abc]{1,3}x"
    found = _fast("lookup").generate(
        PROMPTS, max_new_tokens=9, grammar=regex(pattern, TOKENIZER), eos_token_id=eos, do_sample=True, seed=1
    )
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert row[-1] in ends
        assert re.fullmatch(pattern, TOKENIZER.decode(row[len(prompt) : -1]))


def test_a_tokenizer_may_know_a_token_that_the_model_does_not():
    fast = _optimize("prompt-lookup", Toy(len(TOKENIZER) - 1))
    (row,) = fast.generate([[5, 6]], max_new_tokens=NEW, grammar=GRAMMARS[0], eos_token_id=EOS)
    assert _is_person(json.loads(_new(row, [5, 6])))


def test_a_row_that_reaches_its_limit_is_cut():
    found = _fast("right").generate(PROMPTS, **OPTIONS | {"max_new_tokens": 3})
    assert found == [row[: len(ids) + 3] for row, ids in zip(_expected(), PROMPTS, strict=True)]


@pytest.mark.parametrize(("least", "most"), [(3, 3), (4, 4), (20, NEW)])
def test_an_end_that_is_barred_is_an_error_whether_or_not_the_text_was_drafted(least, most):
    for fast in (_fast("right"), _fast("lookup")):
        with pytest.raises(
            GrammarError, match=r"prompt \d, behind \d new tokens: its text is complete, and the EOS.*min_new_tokens"
        ):
            fast.generate(PROMPTS[:1], max_new_tokens=most, grammar=SHORT, eos_token_id=EOS, min_new_tokens=least)
        found = fast.generate(PROMPTS, max_new_tokens=NEW, grammar=SHORT, eos_token_id=EOS)
        assert all(re.fullmatch("[ab]c", _new(*each)) for each in zip(found, PROMPTS, strict=True))


def test_an_end_that_is_barred_behind_the_limit_is_none():
    found = _fast("right").generate(PROMPTS, max_new_tokens=1, grammar=SHORT, eos_token_id=EOS, min_new_tokens=1)
    assert all(TOKENIZER.decode(row[-1:]) in ("a", "b", "ac", "bc") for row in found)


BAD: dict[str, tuple[dict[str, Any], type[EmssdError], str]] = {
    "a schema": ({"grammar": PERSON}, OptionError, "grammar=.* is no Grammar; make one with .*json_schema"),
    "too few": ({"grammar": GRAMMARS[:2]}, OptionError, "grammar has 2 values for 5 prompts"),
    "no end": ({"grammar": GRAMMARS[0], "eos_token_id": None}, OptionError, "pass eos_token_id"),
    "nothing at all": (
        {"grammar": regex(r"[^\s\S]", TOKENIZER)},
        GrammarError,
        "prompt 0, behind 0 new tokens: the grammar allows none of the model's tokens there",
    ),
    "nothing by another library": (
        {"grammar": matching(lambda: _OfNothing(SHORT), SHORT.vocab_size, SHORT.ends)},
        GrammarError,
        "prompt 0, behind 0 new tokens: the grammar allows none of the model's tokens there",
    ),
    "nothing is left": (
        {"grammar": regex("q", TOKENIZER), "suppress_tokens": TOKENIZER("q")["input_ids"]},
        GrammarError,
        "prompt 0, behind 0 new tokens: all that the grammar allows there is barred by other options",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused_and_the_object_goes_on(case):
    options, error, message = BAD[case]
    fast = _fast("lookup")
    with pytest.raises(error, match=message):
        fast.generate(PROMPTS, **OPTIONS | options)
    assert fast.generate(PROMPTS, **OPTIONS) == _expected()


def test_a_grammar_that_the_vocabulary_cannot_spell_allows_nothing():
    fast = _optimize("prompt-lookup", Toy(60))  # no letters among so few
    with pytest.raises(GrammarError, match="prompt 0, behind 0 new tokens: the grammar allows none of the model's"):
        fast.generate([[5, 6]], max_new_tokens=9, grammar=regex("q", TOKENIZER), eos_token_id=EOS)
    expected = fast.generate([[5, 6]], max_new_tokens=9)
    assert len(expected[0]) == 11
