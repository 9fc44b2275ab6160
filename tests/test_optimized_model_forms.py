"""Forms of one step: compiled when a request first asks for what only they do, found again, on the same tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

import emssd_compile
from emssd_compile import OptimizedModel
from emssd_compile.drafters import PromptLookup
from emssd_compile.errors import StaleModelError
from emssd_compile.logits import LogitContext
from emssd_compile.lowering import BACKENDS
from emssd_compile.passes.graph import inputs
from emssd_compile.runtime.buckets import decode_buckets
from emssd_compile.runtime.launch import GraphLauncher
from tests.exactness.models import Reference
from tests.passes.graphs import VOCABULARY, TinyModel, model_with_attention
from tests.runtime.tape import TapeDevice

PROMPTS, NEW = [[3, 1, 4], [9], [2, 6, 5, 3, 5, 8]], 6
MIN: dict[str, Any] = {"min_new_tokens": NEW}
HOOK: dict[str, Any] = {"logits_hook": lambda context: context.logits}
FORMS: tuple[dict[str, Any], ...] = ({}, MIN, HOOK, {**MIN, **HOOK})


def _model() -> TinyModel:
    torch.manual_seed(0)
    return model_with_attention()


def _optimize(model: TinyModel) -> OptimizedModel:
    return emssd_compile.optimize(model, PromptLookup(3), max_batch=2, max_length=24, backend="eager", layout="packed")


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return _optimize(_model())


@pytest.fixture
def lowered(monkeypatch) -> list[str]:
    """The graphs that were lowered, by name, as they come."""
    found: list[str] = []
    eager = BACKENDS["eager"]

    def counted(graph_module: fx.GraphModule, deterministic: bool = False):
        found.append(graph_module._get_name())
        return eager.lower(graph_module, deterministic)

    monkeypatch.setitem(BACKENDS, "eager", replace(eager, lower=counted))
    return found


def _run(fast: OptimizedModel, **options: Any) -> list[list[int]]:
    """Every token may end a row: with `MIN` none does, before the last."""
    return fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], **options)


def _plain(model: torch.nn.Module) -> list[list[int]]:
    return [[*ids, *Reference(model)(ids, NEW)] for ids in PROMPTS]


def _over_vocabulary(graph_module: fx.GraphModule) -> set[str]:
    """The ops whose results are as wide as the vocabulary."""
    values = ((n.target, n.meta.get("val")) for n in graph_module.graph.nodes if n.op == "call_function")
    wide = {t for t, v in values if isinstance(v, torch.Tensor) and v.dim() == 2 and v.shape[1] == VOCABULARY}
    return {target._opname for target in wide}


def test_what_no_request_asks_for_is_not_in_the_step(fast):
    _run(fast, **MIN)
    plain, barring = (fast._forms[frozenset(used), False].graphs[0] for used in ((), ["min_new_tokens"]))
    assert fast.graph_module is plain
    assert _over_vocabulary(plain) == {"reshape"}, "of what the LM head gives"
    assert "masked_fill" in _over_vocabulary(barring)
    names = [{str(node.target) for node in inputs(graph.graph)} for graph in (plain, barring)]
    assert names[1] - names[0] == {"option_min_new_tokens"}
    assert names[0] <= names[1]


def test_a_form_is_compiled_once_and_found_again(lowered):
    fast = _optimize(_model())
    assert lowered == ["Step"]
    for _ in range(2):
        for options in FORMS:
            _run(fast, **options)
    assert lowered == ["Step", "Step", *["Forward", "Decide"] * 2]
    assert len(fast._forms) == 4


def test_a_value_that_is_the_default_asks_for_nothing(fast, lowered):
    _run(fast, min_new_tokens=0)
    assert lowered == []


def test_warmup_compiles_the_form_that_its_options_ask_for(lowered):
    fast = _optimize(_model())
    fast.warmup(min_new_tokens=1)
    assert lowered == ["Step", "Step"]
    _run(fast, **MIN)
    _run(fast)
    assert lowered == ["Step", "Step"]


def test_forms_share_the_tensors_that_each_of_them_has(fast):
    caches = []
    for options in FORMS * 2:
        _run(fast, **options)
        tensors = fast._engine.tensors
        caches.append({name: t.data_ptr() for name, t in tensors.items() if "_cache_" in name})
    assert caches[0]
    assert all(each == caches[0] for each in caches)
    parameters = [dict(graph.named_parameters()) for form in fast._forms.values() for graph in form.graphs]
    held = {tensor.data_ptr() for each in parameters for tensor in each.values()}
    assert held <= {parameter.data_ptr() for parameter in fast.model.parameters()}


def test_weights_that_change_are_followed_in_all_forms():
    model = _model()
    fast = _optimize(model)
    before = [_run(fast, **options) for options in FORMS]
    assert before == [_plain(model)] * 4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert [_run(fast, **options) for options in FORMS] == [_plain(model)] * 4 != before
    weights = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    model.load_state_dict(weights, strict=False, assign=True)
    assert [_run(fast, **options) for options in reversed(FORMS)] == [_plain(model)] * 4


def test_a_form_made_after_a_weight_was_replaced_follows_too():
    model = _model()
    fast = _optimize(model)
    for options in FORMS:
        model.load_state_dict({"lm_head.weight": torch.randn_like(model.lm_head.weight)}, strict=False, assign=True)
        assert _run(fast, **options) == _plain(model)
    assert [_run(fast, **options) for options in FORMS] == [_plain(model)] * 4


def test_refresh_drops_the_forms_of_the_old_model(lowered):
    model = _model()
    fast = _optimize(model)
    for options in FORMS:
        _run(fast, **options)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, VOCABULARY)
    for options in FORMS:
        with pytest.raises(StaleModelError):
            _run(fast, **options)
    fast.refresh()
    assert len(fast._forms) == 1
    lowered.clear()
    assert [_run(fast, **options) for options in FORMS] == [_plain(model)] * 4
    assert len(lowered) == 5


def test_a_refresh_that_changes_nothing_keeps_them(fast, lowered):
    forms = dict(fast._forms)
    fast.refresh()
    assert fast._forms == forms
    assert lowered == []


def _on_a_played_device(fast: OptimizedModel) -> TapeDevice:
    """As on a CUDA device: steps are captured, and the host is one step behind."""
    device, engine = TapeDevice(), fast._engine
    buckets = decode_buckets(engine.num_rows, engine.num_draft_tokens)
    engine.launcher = GraphLauncher(engine.launcher.variant, engine.launcher.tensors, device, buckets)
    engine.lag = 1
    return device


def test_where_steps_are_captured_each_form_is_captured_by_itself_and_a_hook_runs_between():
    model = _model()
    fast = _optimize(model)
    device = _on_a_played_device(fast)
    buckets = len(fast._engine.launcher.buckets)
    fast.warmup()
    assert device.captures == buckets
    fast.warmup(min_new_tokens=1)
    assert device.captures == 2 * buckets
    calls: list[LogitContext] = []

    def hook(context: LogitContext) -> torch.Tensor:
        calls.append(context)
        return context.logits

    eos = [row[len(ids)] for row, ids in zip(_plain(model), PROMPTS, strict=True)]
    for _ in range(2):
        assert _run(fast) == _plain(model)
        least = fast.generate(PROMPTS, max_new_tokens=NEW, min_new_tokens=3, eos_token_id=eos)
        assert least == [[*ids, *Reference(model)(ids, NEW, eos, 3)] for ids in PROMPTS]
        replays = device.replays
        calls.clear()
        assert _run(fast, logits_hook=hook) == _plain(model)
        assert calls
        assert device.replays == replays, "Python cannot be captured"
    assert device.captures == 2 * buckets
    assert device.replays > 0


def test_requests_that_sample_in_the_usual_ways_share_a_form_which_a_warm_up_compiles(lowered):
    fast = _optimize(_model())
    fast.warmup(do_sample=True)
    compiled = len(lowered)
    for options in ({}, {"temperature": 0.5}, {"top_k": 3, "top_p": 0.5}, {"temperature": 2.0, "top_p": 0.9}):
        _run(fast, do_sample=True, seed=1, **options)
    assert len(lowered) == compiled
