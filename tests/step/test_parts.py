"""Parts declare tensors by names of their own; a part may hold parts, two of one kind too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emssd_compile
from emssd_compile.drafters import (
    Draft,
    DraftContext,
    Drafter,
    DraftModel,
    PartSizes,
    PromptLookup,
    TensorSpec,
    gather_tensors,
    tensors_of,
)
from emssd_compile.errors import DrafterError, PartError
from emssd_compile.step.drafting import Target
from emssd_compile.step.parts import Part, check_tensors
from tests.exactness.models import Reference
from tests.passes.graphs import TinyModel, causal, model_with_attention

SIZES = PartSizes(rows=3, capacity=64, vocabulary=32, num_draft_tokens=2, num_grades=1)
PROMPTS = [[3, 1, 4], [9], [2, 6, 5, 3, 5, 8, 9, 7, 1, 1, 2], [4, 4, 4, 4]]

BAD: dict[str, tuple[Any, str]] = {
    "no dict": ([("a", 1)], "tensors returned a list; return a dict of TensorSpecs by name"),
    "None": (None, "tensors returned a NoneType"),
    "a dot": ({"a.b": TensorSpec((3,), torch.int64)}, r"declares 'a\.b': a tensor's name is made of letters, digits"),
    "no string": ({3: TensorSpec((3,), torch.int64)}, "declares 3: a tensor's name"),
    "no ASCII": ({"é": TensorSpec((3,), torch.int64)}, "declares 'é': a tensor's name"),
    "no spec": ({"a": torch.zeros(3)}, "declares 'a': a Tensor is no TensorSpec"),
    "a list": ({"a": TensorSpec([3], torch.int64)}, r"shape \[3\] is no tuple of integers"),  # type: ignore[arg-type]
    "a negative size": ({"a": TensorSpec((3, -1), torch.int64)}, r"shape \(3, -1\) is no tuple"),
    "a float": ({"a": TensorSpec((3, 2.0), torch.int64)}, r"shape \(3, 2\.0\) is no tuple"),  # type: ignore[arg-type]
    "a bool": ({"a": TensorSpec((3, True), torch.int64)}, r"shape \(3, True\) is no tuple"),
    "dtype": ({"a": TensorSpec((3,), int)}, "dtype <class 'int'> is no torch.dtype"),  # type: ignore[arg-type]
    "kept": ({"a": TensorSpec((3,), torch.int64, kept="always")}, "kept='always' is neither"),  # type: ignore[arg-type]
    "in_place": ({"a": TensorSpec((3,), torch.int64, in_place=1)}, "in_place=1 is neither"),  # type: ignore[arg-type]
    "in place by row": ({"a": TensorSpec((3,), torch.int64, in_place=True)}, "written in place is kept='forever'"),
    "no rows": ({"a": TensorSpec((4, 3), torch.int64)}, r"shape \[4, 3\] has no line a row, which kept='row' needs"),
    "no dimension": ({"a": TensorSpec((), torch.int64)}, r"shape \[\] has no line a row.* first size is B = 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_declaration_that_makes_no_sense_is_refused(name):
    declared, message = BAD[name]
    with pytest.raises(DrafterError, match=f"^Part.*{message}"):
        check_tensors(Part(), declared, SIZES, DrafterError)


SPECS = st.builds(
    TensorSpec,
    st.one_of(st.lists(st.integers(-1, 4), max_size=3).map(tuple), st.just([3]), st.just((3, 1.0)), st.none()),
    st.sampled_from([torch.int64, torch.float32, torch.bool, "int64", None]),
    st.sampled_from(["row", "forever", "", None]),
    st.sampled_from([True, False, 0]),
)


@given(name=st.one_of(st.text(max_size=4), st.sampled_from(["a", "lengths"]), st.integers()), spec=SPECS)
@settings(max_examples=400, deadline=None)
def test_whatever_is_declared_is_taken_as_it_is_or_refused(name, spec):
    try:
        taken = check_tensors(Part(), {name: spec}, SIZES, DrafterError)
    except DrafterError:
        return
    assert taken == {name: spec}
    torch.zeros(spec.shape, dtype=spec.dtype)
    assert f"drafter_{name}".isidentifier()
    assert spec.kept == "forever" or spec.shape[0] == SIZES.rows
    assert not (spec.in_place and spec.kept == "row")


def test_a_part_needs_no_tensors():
    assert check_tensors(Part(), Part().tensors(SIZES), SIZES, PartError) == {}


def test_example_of_the_docstring():
    gathered = gather_tensors({"first": {"lengths": 1}, "second": {"lengths": 2}})
    assert gathered == {"first__lengths": 1, "second__lengths": 2}
    assert tensors_of("second", gathered) == {"lengths": 2}


NAMES = st.text("ab_", min_size=1, max_size=4)


@given(st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(), max_size=3), max_size=3))
@settings(max_examples=400, deadline=None)
def test_gathered_tensors_come_apart_again_or_the_name_is_refused(parts):
    try:
        gathered = gather_tensors(parts)
    except PartError:
        assert any("__" in part or part.endswith("_") for part in parts)
        return
    assert {part: tensors_of(part, gathered) for part in parts} == parts


class Longest(Drafter):
    """Holds drafters, and takes the longest draft of each row."""

    def __init__(self, **drafters: Drafter) -> None:
        super().__init__()
        self.held = drafters
        self.modules_held = torch.nn.ModuleDict(drafters)
        self.num_draft_tokens = next(iter(drafters.values())).num_draft_tokens
        self.reads_ahead = any(drafter.reads_ahead for drafter in drafters.values())

    def prepare(self, target: Target) -> None:
        for drafter in self.held.values():
            drafter.prepare(target)

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return gather_tensors({name: drafter.tensors(sizes) for name, drafter in self.held.items()})

    def forward(self, context: DraftContext) -> Draft:
        drafts = {
            name: drafter(DraftContext(**{**vars(context), "state": tensors_of(name, context.state)}))
            for name, drafter in self.held.items()
        }
        lengths = torch.stack([draft.lengths for draft in drafts.values()])
        best = lengths.argmax(0)  # [B]
        tokens = torch.stack([draft.tokens for draft in drafts.values()])[best, torch.arange(len(best))]
        return Draft(tokens, lengths.amax(0), gather_tensors({name: draft.state for name, draft in drafts.items()}))


class CountingLookup(PromptLookup):
    """Prompt lookup that counts the steps of each row, and drafts in every `period`-th of them only."""

    def __init__(self, period: int) -> None:
        super().__init__(3)
        self.period = period

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"count": TensorSpec((sizes.rows,), torch.int64)}

    def forward(self, context: DraftContext) -> Draft:
        draft, count = super().forward(context), context.state["count"] + 1
        return Draft(draft.tokens, torch.where(count % self.period == 0, draft.lengths, 0), {"count": count})


def _other_model() -> TinyModel:
    torch.manual_seed(7)
    return TinyModel(attend=causal, kv_heads=1)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_two_drafters_of_one_kind_live_in_one(backend):
    torch.manual_seed(0)
    model = model_with_attention()
    models = Longest(right=DraftModel(model, 3), other=DraftModel(_other_model(), 3))
    drafter = Longest(models=models, often=CountingLookup(2), seldom=CountingLookup(3))
    fast = emssd_compile.optimize(model, drafter, max_batch=2, max_length=40, backend=backend, layout="packed")
    reference = Reference(model)
    assert fast.generate(PROMPTS, max_new_tokens=12) == [[*ids, *reference(ids, 12)] for ids in PROMPTS]
    names = {name for name in fast._engine.tensors if name.startswith("drafter_")}
    lengths = {"drafter_models__right__lengths", "drafter_models__other__lengths"}
    assert lengths | {"drafter_often__count", "drafter_seldom__count"} <= names
    assert sum("cache" in name for name in names) == 4
    assert fast.stats.num_accepted_draft_tokens > 0
