"""Rows of one batch that end with tokens of their own: each as alone, and beside the others wherever that can be."""

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emssd_compile import optimize
from emssd_compile.ends import looks_at_ends, shared_eos
from emssd_compile.errors import OptionError
from emssd_compile.generation import eos_of_each
from emssd_compile.logits import PROCESSORS, LogitContext, LogitsProcessor
from emssd_compile.probes import PROBES
from emssd_compile.runtime.requests import Request
from emssd_compile.step.logits import Processed
from tests.export.subjects import Small, prompt
from tests.logits.contexts import Line, context
from tests.sessions import NEW, SAMPLED, WAIT, alone, fast, held

PROMPTS = [prompt(n) for n in (6, 3, 8, 5)]


class _Looked(Exception):
    """A processor asked for the tokens that end a row."""


@dataclass
class _Hidden(LogitContext):
    """A context that tells who looks."""

    def __getattribute__(self, name: str) -> Any:
        if name == "is_eos":
            raise _Looked
        return super().__getattribute__(name)


@pytest.mark.parametrize("make", PROCESSORS)
def test_who_looks_at_the_tokens_that_end_a_row_is_known(make):
    processor = make()
    seen = context([Line([1, 2, 3], [], [])], 2, trees=False)
    given = {name: option.lines([option.default]) for name, option in processor.options().items()}
    hidden = _Hidden(**vars(replace(seen, options=given)))
    try:
        processor(hidden)
        looks = False
    except _Looked:
        looks = True
    for name in processor.options():
        assert looks_at_ends({name}) == looks, name


def test_probes_and_what_draws_do_not_and_what_is_unknown_may():
    for make in PROBES:
        assert not looks_at_ends(make().options())
    assert not looks_at_ends({"do_sample"})
    assert not looks_at_ends(())
    assert looks_at_ends({"do_sample", "someones_own"})


def test_what_rows_have_in_common():
    def request(*eos: int) -> Request:
        return Request(0, torch.tensor(prompt(3)), 1, eos_token_ids=frozenset(eos))

    assert shared_eos([]) == frozenset()
    assert shared_eos([request(1, 2)]) == {1, 2}
    assert shared_eos([request(1, 2), request(2, 3)]) == {2}
    assert shared_eos([request(1, 2), request()]) == frozenset()


def _ends() -> list[list[int]]:
    """Of each prompt: tokens that it says, one none, and one that the others say."""
    new = [alone(ids)[len(ids) :] for ids in PROMPTS]
    return [[new[0][7]], [], [new[2][4], new[0][0]], [new[3][2]]]


def test_each_prompt_of_a_batch_ends_at_its_own():
    ends = _ends()
    expected = [alone(ids, eos_token_id=eos) for ids, eos in zip(PROMPTS, ends, strict=True)]
    assert len({len(row) - len(ids) for row, ids in zip(expected, PROMPTS, strict=True)}) > 2, "they end in many places"
    assert fast().generate(PROMPTS, max_new_tokens=NEW, eos_token_id=ends) == expected
    assert fast().generate(PROMPTS[1:2], max_new_tokens=NEW) == [alone(PROMPTS[1])], "and it leaves nothing behind"
    single: list[Any] = [ends[0][0], None, (*ends[2],), ends[3]]
    assert fast().generate(PROMPTS, max_new_tokens=NEW, eos_token_id=single) == expected
    (both, *_) = several = fast().generate(
        PROMPTS[:2], max_new_tokens=NEW, eos_token_id=ends[:2], num_return_sequences=2, seed=[1, 2], **SAMPLED
    )
    assert both == alone(PROMPTS[0], eos_token_id=ends[0], seed=1, **SAMPLED)
    assert several[2] == alone(PROMPTS[1], eos_token_id=[], seed=2, **SAMPLED)


def _hook(seen: Any) -> Any:
    return seen.logits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eos_token_id": [[1], [2]]}, "eos_token_id has 2 values for 4 prompts"),
        ({"eos_token_id": [[1], [2], [3], [10_000]]}, "outside the vocabulary"),
        ({"eos_token_id": [[1], [2], [3], ["x"]]}, "eos_token_id"),
        ({"eos_token_id": [[1], [2], [3], []], "min_new_tokens": 3}, "eos_token_id differs between the prompts"),
        ({"eos_token_id": [[1], [2], [3], []], "logits_hook": _hook}, "eos_token_id differs between the prompts"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(OptionError, match=said):
        fast().generate(PROMPTS, max_new_tokens=NEW, **options)


def test_what_acts_on_the_eos_may_be_set_where_it_is_one():
    eos = alone(PROMPTS[0])[8]
    found = fast().generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[[eos]] * 4, min_new_tokens=5)
    assert found == [alone(ids, eos_token_id=eos, min_new_tokens=5) for ids in PROMPTS]


def _order(streams: dict[str, Any]) -> list[str]:
    """Names of requests as they will end."""
    ended: list[str] = []
    for name, stream in streams.items():
        stream.add_done_callback(lambda _, name=name: ended.append(name))
    return ended


def test_configs_may_differ_in_what_ends_their_rows():
    ends = _ends()
    configs = [SimpleNamespace(eos_token_id=eos, max_new_tokens=NEW) for eos in ends]
    expected = [alone(ids, eos_token_id=eos) for ids, eos in zip(PROMPTS, ends, strict=True)]
    assert fast().generate(PROMPTS, configs) == expected
    assert fast().generate(PROMPTS, configs, eos_token_id=ends[0]) == [
        alone(ids, eos_token_id=ends[0]) for ids in PROMPTS
    ]
    with pytest.raises(OptionError, match="eos_token_id differs between the prompts"):
        fast().generate(PROMPTS, configs, min_new_tokens=3)


def test_requests_of_a_session_end_at_their_own_and_none_waits_for_another():
    ends = _ends()
    with fast().session() as session:
        with held(session, max_new_tokens=50) as long:
            streams = {"long": long} | {
                str(n): session.submit(ids, max_new_tokens=NEW, eos_token_id=eos)
                for n, (ids, eos) in enumerate(zip(PROMPTS, ends, strict=True))
            }
            order = _order(streams)
        results = [streams[str(n)].result(WAIT) for n in range(4)]
        assert "long" not in order, "they did not wait for it"
        assert long.result(WAIT) == alone(prompt(5), max_new_tokens=50)
    assert results == [alone(ids, eos_token_id=eos) for ids, eos in zip(PROMPTS, ends, strict=True)]
    assert [streams[str(n)].finish_reason for n in range(4)] == ["eos", "length", "eos", "eos"]


def test_a_request_that_acts_on_its_eos_waits_for_those_with_another():
    eos = _ends()[0][0]
    with fast().session() as session:
        with held(session, max_new_tokens=30) as long:
            strict = session.submit(PROMPTS[0], max_new_tokens=NEW, eos_token_id=eos, min_new_tokens=9)
            behind = session.submit(PROMPTS[1], max_new_tokens=40)
            order = _order({"long": long, "strict": strict, "behind": behind})
        behind.result(WAIT)
    assert order == ["long", "strict", "behind"]
    assert strict.result() == alone(PROMPTS[0], eos_token_id=eos, min_new_tokens=9)
    assert len(strict.tokens) > 8
    assert behind.result() == alone(PROMPTS[1], max_new_tokens=40)


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_is_exact(seed):
    draw = random.Random(seed)
    said = [token for ids in PROMPTS for token in alone(ids)[len(ids) :]]
    asked: list[tuple[list[int], dict[str, Any]]] = []
    for _ in range(24):
        options: dict[str, Any] = {"eos_token_id": draw.sample(said, draw.choice([0, 1, 1, 3]))}
        if draw.random() < 0.2:
            options["min_new_tokens"] = draw.randint(2, NEW)
        asked.append((draw.choice(PROMPTS), options))
    with fast().session() as session:
        streams = [session.submit(ids, max_new_tokens=NEW, **options) for ids, options in asked]
    assert [stream.result() for stream in streams] == [alone(ids, **options) for ids, options in asked]


class _NoEnd(LogitsProcessor):
    """Bars whatever ends a row; no option asks for it."""

    def forward(self, context: LogitContext) -> Processed:
        return Processed(context.logits.masked_fill(context.is_eos, -torch.inf))


def test_rows_that_end_otherwise_do_not_run_beside_a_processor_that_may_look_at_their_ends():
    own = optimize(Small(), "none", max_batch=2, max_length=64, backend="eager", layout="packed", processors=[_NoEnd()])
    prompts, ends = (prompt(6), prompt(3)), ([7], [11])
    apart = [own.generate([p], max_new_tokens=8, eos_token_id=e)[0] for p, e in zip(prompts, ends, strict=True)]
    with pytest.raises(OptionError, match="a processor of your own"):
        own.generate([*prompts], max_new_tokens=8, eos_token_id=[*ends])
    with own.session() as session:
        submitted = [session.submit(p, max_new_tokens=8, eos_token_id=e) for p, e in zip(prompts, ends, strict=True)]
        assert [each.result(600) for each in submitted] == apart


@pytest.mark.parametrize("each", [torch.tensor([[3, 1], [2, 2]]), [torch.tensor([3, 1]), torch.tensor([2])]])
def test_sets_of_ends_may_be_tensors(each):
    assert [set(own) for own in eos_of_each(each) or []] == [{3, 1}, {2}]
