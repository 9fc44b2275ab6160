"""A graph that was compared with its model at full length is compared briefly the next time, and no other one is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from emssd_compile import identity, tested_graphs
from emssd_compile.compiler import CompiledModel, compile_model
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.selfcheck import check_against
from emssd_compile.step.batch import BatchShape
from tests.passes.graphs import TinyModel, causal
from tests.zoo import toy_model

BATCH = BatchShape(rows=2, capacity=80)
FULL, BRIEF = ((1, 6, 19, longest) for longest in (80, 64))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMSSD_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compile_model(toy_model("llama"), BATCH)


def _checked(model: torch.nn.Module, compiled: CompiledModel) -> str:
    check_against(model, compiled)
    return str(compiled.records[-1].notes[0])


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_second_time_only_a_brief_row_is_compared(family):
    model = toy_model(family)
    assert _checked(model, compile_model(model, BATCH)).startswith(f"tested: logits of rows of {FULL} tokens")
    note = _checked(model, compile_model(toy_model(family), BATCH))
    assert note.startswith(f"tested at full length when this graph was first made; tested: logits of rows of {BRIEF}")
    longer = compile_model(model, BatchShape(rows=2, capacity=96))
    assert f"{(1, 6, 19, 96)}" in _checked(model, longer)


def test_other_weights_are_compared_briefly_and_refused_if_they_are_not_the_graphs(compiled):
    _checked(toy_model("llama"), compiled)
    other = toy_model("llama", seed=1)
    assert f"{BRIEF}" in _checked(other, compile_model(other, BATCH))
    with pytest.raises(UnsupportedModelError, match=r"rows of \(1, 6, 19, 64\) tokens"):
        check_against(other, compiled)


def test_what_failed_is_not_remembered(compiled):
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"rows of \(1, 6, 19, 80\) tokens"):
            check_against(toy_model("llama", seed=1), compiled)


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/within"])
def test_where_nothing_can_be_kept_all_is_compared_each_time(place, compiled, monkeypatch):
    monkeypatch.setenv("EMSSD_CACHE_DIR", place)
    assert [f"{FULL}" in _checked(toy_model("llama"), compiled) for _ in range(2)] == [True, True]


def _held(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    model.model.layers[1].self_attn.scaling *= 2
    return compiled


def _configured(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    model.config.rms_norm_eps *= 2
    return compiled


def _released(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    package = identity.package
    monkeypatch.setattr(identity, "package", lambda name: (package(name)[0] + "+1", package(name)[1]))
    return compiled


def _rewritten(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    monkeypatch.setattr(identity, "own_sources", lambda: "other sources")
    return compiled


def _looked_at(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    return dataclasses.replace(compiled, looked_at={name: value + 1 for name, value in compiled.looked_at.items()})


def _other_graph(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    return compile_model(toy_model("llama", rms_norm_eps=0.5), BATCH)


def _patched_class(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    monkeypatch.setattr(type(model.model.norm), "forward", torch.nn.Identity.forward)
    return compiled


def _patched_function(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.rotate_half)
    return compiled


def _listed(model: Any, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    model.model.norm.limits = {"longest": [24]}
    return compiled


CHANGES = (
    *(_held, _listed, _configured, _patched_class, _patched_function),
    *(_released, _rewritten, _looked_at, _other_graph),
)


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_what_tells_them_apart_gives_another_name(change, compiled, monkeypatch):
    model = toy_model("llama")
    compiled = dataclasses.replace(compiled, looked_at={"table": torch.arange(3.0), "number": torch.tensor(1.0)})
    before = tested_graphs.name_of(model, compiled, "so")
    assert before is not None
    assert (
        before
        == tested_graphs.name_of(toy_model("llama"), compiled, "so")
        != tested_graphs.name_of(model, compiled, "")
    )
    changed = change(model, compiled, monkeypatch)
    assert tested_graphs.name_of(model, changed, "so") not in {before, None}


def _hooked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.register_forward_hook(lambda module, given, found: found)


def _replaced(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.forward = lambda hidden: hidden


class _Own(torch.nn.Linear):
    """A class of no package."""


def _of_own_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.__class__ = _Own


def _of_no_module(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.__class__ = type("Norm", (type(model.model.norm),), {"__module__": "transformers.nowhere"})


def _own_forward(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, hidden: hidden)


def _own_function(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))


def _globally_hooked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = {0: lambda module, given, found: found}
    monkeypatch.setattr(torch.nn.modules.module, "_global_forward_hooks", hooks)


def _edited_where_it_lies(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"direct_url.json": '{"url": "file:///", "dir_info": {"editable": true}}'}
    monkeypatch.setattr(metadata.PathDistribution, "read_text", lambda self, name: told.get(name, ""))


NAMELESS = (
    _hooked,
    _globally_hooked,
    _replaced,
    _of_own_class,
    _of_no_module,
    _own_forward,
    _own_function,
    _edited_where_it_lies,
)


@pytest.mark.parametrize("change", NAMELESS)
def test_code_that_was_not_installed_has_no_name(change: Callable[..., None], compiled, monkeypatch):
    model = toy_model("llama")
    assert tested_graphs.name_of(model, compiled, "") is not None
    change(model, monkeypatch)
    assert tested_graphs.name_of(model, compiled, "") is None


def test_a_hand_written_model_is_compared_at_full_length_each_time():
    model = TinyModel(lambda m, x, ids: x, attend=causal)
    assert [f"{FULL}" in _checked(model, compile_model(model, BATCH)) for _ in range(2)] == [True, True]
