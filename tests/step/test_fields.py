"""Dataclasses of tensors: each tensor has a name, and goes back to its place by it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from emssd_compile.step.fields import STATIC, holds_tensors, mapped, named, spelled, with_named
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.state import StepState


@holds_tensors
@dataclass
class _Inner:
    """A dataclass within one; `parents` may be left out, and `most` is a number."""

    tokens: Tensor
    parents: Tensor | None
    most: int = field(metadata=STATIC)


@holds_tensors
@dataclass
class _Outer:
    """One of each kind of field."""

    known: Tensor
    draft: _Inner
    state: dict[str, Tensor] = field(default_factory=dict)
    path: Tensor | None = None


def _outer(parents: bool = True, path: bool = False) -> _Outer:
    inner = _Inner(torch.tensor([1]), torch.tensor([2]) if parents else None, 7)
    state = {"seen": torch.tensor([3]), "k_cache_0": torch.tensor([4])}
    return _Outer(torch.tensor([0]), inner, state, torch.tensor([5]) if path else None)


def test_names_join_the_fields_on_the_way():
    names = {name: int(value) for name, value in named(_outer()).items()}
    assert names == {"known": 0, "draft_tokens": 1, "draft_parents": 2, "state_seen": 3, "state_k_cache_0": 4}


@pytest.mark.parametrize("parents", [False, True])
@pytest.mark.parametrize("path", [False, True])
def test_tensors_go_back_where_they_came_from(parents, path):
    before = _outer(parents, path)
    tensors = {name: value + 10 for name, value in named(before).items()}
    after = with_named(before, dict(reversed(tensors.items())))
    assert type(after) is _Outer
    assert type(after.draft) is _Inner
    assert (after.draft.parents is None) is not parents
    assert (after.path is None) is not path
    assert after.draft.most == 7, "what is no tensor stays as it is"
    assert named(after).keys() == tensors.keys()
    assert all(named(after)[name] is value for name, value in tensors.items())
    assert [*after.state] == ["seen", "k_cache_0"]
    assert int(before.known) == 0, "the one it was made of is left alone"


def test_whatever_stands_for_a_tensor_may_take_its_place():
    assert with_named(_outer(), {name: name for name in named(_outer())}).draft.tokens == "draft_tokens"


def test_a_tensor_that_is_missing_is_named():
    tensors = named(_outer())
    del tensors["draft_parents"]
    with pytest.raises(KeyError, match="draft_parents"):
        with_named(_outer(), tensors)


def test_messages_spell_the_expression():
    assert [*spelled(_outer(path=True), "context")] == [
        "context.known",
        "context.draft.tokens",
        "context.draft.parents",
        "context.state['seen']",
        "context.state['k_cache_0']",
        "context.path",
    ]


def test_a_function_reaches_tensors_and_nothing_else():
    result = mapped(lambda value: value * 2, _outer(parents=False))
    assert [int(value) for value in named(result).values()] == [0, 2, 6, 8]
    assert (result.draft.most, result.draft.parents, result.path) == (7, None, None)


@pytest.mark.parametrize("max_depth", [None, 2])
def test_a_steps_state_has_parents_where_drafts_are_trees(max_depth):
    state = StepState.empty(PartSizes(2, 8, 5, 4, max_depth=max_depth), torch.device("cpu"))
    names = [*state.tensors()]
    assert names[3 : names.index("active")] == [
        "draft_tokens",
        "draft_lengths",
        "draft_grades",
        *(["draft_parents"] if max_depth else []),
    ]
    assert len(state.histogram) == (max_depth or 4) + 1
    assert with_named(state, state.tensors()).draft.max_depth == (max_depth or 4)
