"""Options of parts and logits hooks in `generate`: what cannot be meant is refused, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import emssd_compile
from emssd_compile.acceptance import GreedyMatch, Rule, Verdict, Verification
from emssd_compile.drafters import Draft, DraftContext, Drafter, PromptLookup
from emssd_compile.errors import DrafterError, OptionError, PartError, ProcessorError, ReentryError, RuleError
from emssd_compile.logits import LogitContext, LogitsProcessor, Processed, RowOption
from tests.exactness.models import Reference
from tests.passes.graphs import model_with_attention

PROMPTS, NEW = [[3, 1, 4], [9], [2, 6, 5, 3, 5, 8]], 6


class _Part(LogitsProcessor):
    """Does what it is told to a context.

    Args:
        change: gives the answer.
        options: what it declares.
    """

    def __init__(self, change: Callable[[LogitContext], Any], options: Any = None) -> None:
        super().__init__()
        self.change = change
        self.declared = {"bias": RowOption(0.0, torch.float32, least=0)} if options is None else options

    def options(self) -> dict[str, RowOption]:
        return self.declared

    def forward(self, context: LogitContext) -> Processed:
        return self.change(context)


def _nothing(context: LogitContext) -> Processed:
    return Processed(context.logits)


def _optimize(*processors: Any, drafter: Any = "none", rule: Any = "auto") -> emssd_compile.OptimizedModel:
    torch.manual_seed(0)
    return emssd_compile.optimize(
        model_with_attention(),
        drafter,
        max_batch=2,
        max_length=32,
        backend="eager",
        acceptance=rule,
        processors=list(processors),
    )


@pytest.fixture(scope="module")
def fast():
    return _optimize(_Part(_nothing), drafter=PromptLookup(3))


@pytest.fixture(scope="module")
def expected(fast):
    reference = Reference(fast.model)
    return [[*ids, *reference(ids, NEW)] for ids in PROMPTS]


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"bais": 1}, "no option 'bais'"),
    "type": ({"bias": "much"}, "bias='much' is not a number"),
    "bool": ({"bias": True}, "bias=True is not a number"),
    "range": ({"bias": -1.0}, r"bias=-1\.0 is out of range; pass at least 0"),
    "one of the list": ({"bias": [0, 1, -1]}, "bias=-1 is out of range"),
    "a short list": ({"bias": [0, 1]}, "bias has 2 values for 3 prompts; pass one for each, or one for all"),
    "a long tuple": ({"bias": (0, 1, 2, 3)}, "bias has 4 values for 3 prompts"),
    "no function": ({"logits_hook": 3}, "logits_hook=3 cannot be called"),
    "a penalty of nothing": ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 is out of range"),
    "a penalty beyond its range": ({"presence_penalty": 2.5}, r"presence_penalty=2\.5 is out of range; pass at most 2"),
    "n-grams that are too long": ({"no_repeat_ngram_size": 17}, "no_repeat_ngram_size=17 is out of range; .* most 16"),
    "a token that is none": ({"suppress_tokens": [1, 32]}, "suppress_tokens: 32 is no id .* from 0 to 31"),
    "a word of nothing": ({"bad_words_ids": [[1], []]}, r"bad_words_ids: \[\] is no sequence of token ids"),
    "a long word": ({"bad_words_ids": [[1] * 17]}, "bad_words_ids: a sequence has 17 ids; pass at most 16"),
    "many words": (
        {"bad_words_ids": [[a, b] for a in range(32) for b in range(17)]},
        "bad_words_ids has 544 sequences; a row has room for 512",
    ),
    "no bias": ({"sequence_bias": {(1, 2): None}}, "sequence_bias=None is not a number"),
    "a bias of no token": ({"logit_bias": {-1: 1.0}}, "logit_bias: -1 is no id"),
    "forced tokens for two prompts": (
        {"forced_bos_token_id": [1, 2]},
        "forced_bos_token_id has 2 values for 3 prompts",
    ),
    "no pair": ({"exponential_decay_length_penalty": 1.5}, r"exponential_decay_length_penalty=1\.5 is no pair"),
    "no flag": ({"remove_invalid_values": 1}, "remove_invalid_values=1 is not True or False"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_cannot_be_meant_is_refused_before_any_work(fast, expected, name):
    options, message = OPTIONS[name]
    fast.stats.reset()
    with pytest.raises(OptionError, match=message):
        fast.generate(PROMPTS, max_new_tokens=NEW, **options)
    assert fast.stats.num_steps == 0
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected


@pytest.mark.parametrize(
    ("options", "message"), [({"max_new_tokens": 3}, "max_new_tokens asks for no form"), OPTIONS["range"]]
)
def test_a_warmup_refuses_what_is_none_of_a_rows_options(fast, options, message):
    with pytest.raises(OptionError, match=message):
        fast.warmup(**options)


class _Optional(Drafter):
    num_draft_tokens = 1

    def options(self) -> dict[str, RowOption]:
        return {"bias": RowOption(1.0, torch.float32)}

    def forward(self, context: DraftContext) -> Draft:
        return Draft(context.history[:, :1], context.known * 0)


PROCESSORS: dict[str, tuple[list[Any], type[Exception], str]] = {
    "a class": ([_Part], OptionError, r"processors holds _Part; make instances"),
    "a function": ([_nothing], OptionError, "processors holds function"),
    "no forward": ([LogitsProcessor()], ProcessorError, "LogitsProcessor has no forward of its own"),
    "no options": ([_Part(_nothing, [])], ProcessorError, "_Part.options returned a list"),
    "a bad default": ([_Part(_nothing, {"x": RowOption(1.5)})], ProcessorError, r"default=1\.5 is not an integer"),
    "a clash": (
        [_Part(_nothing), _Part(_nothing, {"bias": RowOption(0)})],
        ProcessorError,
        "_Part declares the option 'bias' as RowOption.*another part",
    ),
    "a clash with the package": (
        [_Part(_nothing, {"min_new_tokens": RowOption(1)})],
        ProcessorError,
        "_Part declares the option 'min_new_tokens'",
    ),
    "a keyword": ([_Part(_nothing, {"max_time": RowOption(1)})], PartError, "declares the option 'max_time', which"),
    "an argument": ([_Part(_nothing, {"progress": RowOption(1)})], PartError, "declares the option 'progress', which"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_that_make_no_sense_are_refused_by_name(name):
    processors, error, message = PROCESSORS[name]
    with pytest.raises(error, match=message):
        _optimize(*processors)


def test_an_option_may_clash_with_a_drafters():
    with pytest.raises(ProcessorError, match=r"_Part declares the option 'bias'.*another part as"):
        _optimize(_Part(_nothing), drafter=_Optional())


def test_processors_are_a_list():
    with pytest.raises(OptionError, match=r"processors=_Part is no list; pass processors=\[\.\.\.\]"):
        emssd_compile.optimize(model_with_attention(), processors=_Part(_nothing))  # type: ignore[arg-type]


def _writing(context: LogitContext) -> Processed:
    return Processed(context.logits.zero_())


ANSWERS: dict[str, tuple[Callable[[LogitContext], Any], str]] = {
    "fewer logits": (lambda c: Processed(c.logits[1:]), "_Part returned logits = .*expected them as they came"),
    "fewer tokens": (lambda c: Processed(c.logits[:, 1:]), "_Part returned logits"),
    "doubles": (lambda c: Processed(c.logits.double()), r"_Part returned logits = torch\.float64"),
    "no tensor": (lambda c: Processed(None), "_Part returned logits = None"),  # type: ignore[arg-type]
    "a tensor": (lambda c: c.logits, "_Part returned a Tensor; expected a Processed"),
    "nothing": (lambda c: None, "_Part returned a NoneType"),
    "state": (lambda c: Processed(c.logits, {"x": c.known}), r"_Part returned state \['x'\]; it declares \[\]"),
    "in place": (_writing, r"_Part.forward writes to context\.logits in place"),
    "the host": (lambda c: Processed(c.logits * float(c.logits.sum())), "_Part.forward reads a value to the host"),
    "sizes": (lambda c: Processed(c.logits[c.is_eos.nonzero()]), "_Part.forward makes a shape that depends on values"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_processor_that_breaks_its_contract_is_refused_by_name(name):
    change, message = ANSWERS[name]
    with pytest.raises(ProcessorError, match=message):
        _optimize(_Part(change, {}))


def test_a_processor_that_keeps_tensors_is_refused():
    part = _Part(_nothing, {})

    def keep(context: LogitContext) -> Processed:
        part.kept = context.logits
        return Processed(context.logits)

    part.change = keep
    with pytest.raises(ProcessorError, match=r"_Part\.forward keeps 'kept' in itself"):
        _optimize(part)


def test_a_processor_that_is_refused_when_it_is_first_asked_for_leaves_the_object_as_it_was(expected):
    fast = _optimize(_Part(ANSWERS["doubles"][0]))
    for _ in range(2):
        with pytest.raises(ProcessorError, match="_Part returned logits"):
            fast.generate(PROMPTS, max_new_tokens=NEW, bias=1)
        assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected


def _raising(context: LogitContext) -> Tensor:
    raise KeyError("no idea")


HOOKS: dict[str, tuple[Callable[[LogitContext], Any], type[Exception], str]] = {
    "None": (
        lambda c: None,
        ProcessorError,
        "the logits hook returned NoneType; it is to return logits as it got them",
    ),
    "a list": (lambda c: c.logits.tolist(), ProcessorError, "hook returned list"),
    "fewer": (lambda c: c.logits[:, 1:], ProcessorError, r"hook returned torch\.float32 \[\d+, 31\]; .* \[\d+, 32\]"),
    "doubles": (lambda c: c.logits.double(), ProcessorError, r"hook returned torch\.float64"),
    "raises": (_raising, KeyError, "no idea"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_fails_leaves_the_object_usable(fast, expected, name):
    hook, error, message = HOOKS[name]
    calls = []

    def late(context: LogitContext) -> Tensor:
        calls.append(context)
        return hook(context) if len(calls) > 2 else context.logits

    with pytest.raises(error, match=message):
        fast.generate(PROMPTS, max_new_tokens=NEW, logits_hook=late)
    assert len(calls) == 3
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert fast.generate(PROMPTS, max_new_tokens=NEW, logits_hook=lambda c: c.logits) == expected


def test_a_hook_may_write_into_what_it_gets(fast, expected):
    def scribble(context: LogitContext) -> Tensor:
        logits = context.logits.clone()
        for value in (context.logits, context.history, context.known, context.draft.tokens, context.row_ids):
            value.zero_()
        return logits

    assert fast.generate(PROMPTS, max_new_tokens=NEW, logits_hook=scribble) == expected
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected


def test_a_hook_does_not_call_generate_again(fast, expected):
    def again(context: LogitContext) -> Tensor:
        return fast.generate(PROMPTS, max_new_tokens=1)

    with pytest.raises(ReentryError):
        fast.generate(PROMPTS, max_new_tokens=NEW, logits_hook=again)
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected


def test_an_artifact_has_no_place_for_a_hook(fast, expected, tmp_path):
    pytest.importorskip("onnxruntime")
    fast.export_onnx(tmp_path / "step", check=False, row_options=["min_new_tokens", "bias"])
    loaded = emssd_compile.load(tmp_path / "step")
    with pytest.raises(NotImplementedError, match=r"logits_hook, .*: an artifact's step is one graph"):
        loaded.generate(PROMPTS, max_new_tokens=NEW, logits_hook=lambda c: c.logits)
    assert loaded.row_options == {name: fast.row_options[name] for name in ("min_new_tokens", "bias")}
    assert loaded.manifest.processors == ["MinNewTokens", "_Part"]
    assert loaded.generate(PROMPTS, max_new_tokens=NEW, bias=[0, 1, 2]) == expected
    with pytest.raises(OptionError, match="bias=-1 is out of range"):
        loaded.generate(PROMPTS, max_new_tokens=NEW, bias=-1)


class _Parents(Drafter):
    def __init__(self, max_depth: int | None) -> None:
        super().__init__()
        self.num_draft_tokens, self.max_depth = 2, max_depth

    def forward(self, context: DraftContext) -> Draft:
        tokens = context.history[:, :2]
        return Draft(tokens, context.known * 0, parents=tokens * 0 if self.max_depth is None else None)


@pytest.mark.parametrize(
    ("max_depth", "message"),
    [(None, "_Parents returned parents, but the drafts are chains"), (2, "_Parents returned parents = None; expected")],
)
def test_parents_are_of_drafters_of_trees_only(max_depth, message):
    with pytest.raises(DrafterError, match=message):
        _optimize(drafter=_Parents(max_depth))


class _Path(Rule):
    """Greedy matching that forgets the path of a tree, and makes one up for a chain."""

    guarantees = "tokens"

    def forward(self, verification: Verification) -> Verdict:
        verdict = GreedyMatch()(verification)
        rows, depth = verification.draft.tokens.shape[0], verification.draft.max_depth
        return replace(verdict, path=torch.zeros(rows, depth + 1).long() if verdict.path is None else None)


class _Tree(_Parents):
    def forward(self, context: DraftContext) -> Draft:
        return replace(super().forward(context), parents=context.history[:, :2] * 0)


@pytest.mark.parametrize(
    ("drafter", "message"),
    [("none", "_Path returned path, but the drafts are chains"), (_Tree(2), "_Path returned path = None; expected")],
)
def test_paths_are_of_trees_only(drafter, message):
    with pytest.raises(RuleError, match=message):
        _optimize(drafter=drafter, rule=_Path())


OFF: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "sequence_bias": [],
    "bad_words_ids": [],
    "logit_bias": {},
    "suppress_tokens": (),
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
}


def test_what_asks_for_nothing_compiles_nothing(fast, expected):
    forms = set(fast._forms)
    assert fast.generate(PROMPTS, max_new_tokens=NEW, **OFF) == expected
    for name, value in OFF.items():
        fast.generate(PROMPTS[:1], max_new_tokens=1, **{name: value})
    assert set(fast._forms) == forms


def test_a_warmup_takes_lists_too():
    fast = _optimize()
    with pytest.raises(OptionError, match="suppress_tokens: 32 is no id"):
        fast.warmup(suppress_tokens=[32])
    fast.warmup(suppress_tokens=[3])
    forms = set(fast._forms)
    assert len(forms) == 2
    fast.generate(PROMPTS, max_new_tokens=NEW, suppress_tokens=[4, 5])
    assert set(fast._forms) == forms


def test_a_list_in_a_config_is_one_value_for_all_prompts(fast, expected):
    tokens = [row[len(ids)] for row, ids in zip(expected, PROMPTS, strict=True)]  # as many as there are prompts
    config = SimpleNamespace(suppress_tokens=tokens, max_new_tokens=NEW)
    found = fast.generate(PROMPTS, config)
    assert found == fast.generate(PROMPTS, max_new_tokens=NEW, suppress_tokens=tokens)
    assert not {token for row, ids in zip(found, PROMPTS, strict=True) for token in row[len(ids) :]} & {*tokens}
    assert fast.generate(PROMPTS, config, suppress_tokens=None) == expected
