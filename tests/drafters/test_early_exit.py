"""`EarlyExit`: the target without some of its layers drafts, in the target's own cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

import emssd_compile
from emssd_compile import OptimizedModel
from emssd_compile.drafters import EarlyExit
from emssd_compile.errors import DrafterError, OptionError, UnsupportedModelError
from tests.drafters.contexts import context
from tests.exactness.models import Reference, prompt
from tests.passes.graphs import model_with_attention
from tests.zoo import toy_model

LAYERS, NEW = 4, 20
PROMPTS = [prompt(n) for n in (5, 1, 23, 40)]
SHAPES: list[dict[str, Any]] = [{"num_draft_tokens": 3}, {"tree": (3, 1, 2)}]


def _model(architecture: str = "llama") -> Any:
    name = {"gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    return toy_model(architecture, **{name: LAYERS})


def _fast(model: nn.Module, drafter: Any, **options: Any) -> OptimizedModel:
    defaults: dict[str, Any] = {"max_batch": 3, "max_length": 80, "backend": "eager", "layout": "packed"}
    return emssd_compile.optimize(model, drafter, **(defaults | options))


@pytest.mark.parametrize(
    ("architecture", "layers", "shape"),
    [
        ("llama", 2, SHAPES[0]),
        ("gpt2", (0, 3), SHAPES[1]),
        *(pytest.param("gpt_neox", (0, 1, 3), shape, marks=pytest.mark.long) for shape in SHAPES),
    ],
)
def test_tokens_are_the_models_own(architecture, layers, shape):
    model = _model(architecture)
    fast, plain = _fast(model, EarlyExit(layers, **shape), prefill_chunk=40), _fast(model, "none")
    reference = Reference(model)
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "seed": 5, "max_new_tokens": NEW}
    assert fast.generate(PROMPTS, **sampling) == plain.generate(PROMPTS, **sampling)
    fast.generate(PROMPTS[2:3], num_return_sequences=3, **{**sampling, "seed": [8]})
    assert fast.stats.num_accepted_draft_tokens > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_all_layers_every_draft_is_right(shape):
    fast = _fast(_model(), EarlyExit(LAYERS, **shape))
    (text,) = fast.generate([PROMPTS[0]], max_new_tokens=NEW)
    assert len(text) == len(PROMPTS[0]) + NEW
    assert fast.stats.num_steps == 1 + -(-(NEW - 1) // 4), "each step emits three drafts and one more"


def test_drafts_are_those_of_a_model_with_the_first_layers():
    """What the target has written of the text is what that model would have: its layers see no others."""
    model = _model()
    small = copy.deepcopy(model)
    small.model.layers = small.model.layers[:2]
    seen: list[tuple[list[int], list[int]]] = []

    fast = _fast(model, EarlyExit(2, 3), max_batch=1)
    fast.warmup()
    launch = fast._engine.launcher.launch

    def watched(sizes: Any) -> Any:
        report = launch(sizes)
        tensors = fast._engine.tensors
        text = tensors["history"][0, : tensors["known"][0]].tolist()
        seen.append((text, tensors["draft_tokens"][0, : tensors["draft_lengths"][0]].tolist()))
        return report

    fast._engine.launcher.launch = watched  # type: ignore[method-assign]
    fast.generate(PROMPTS[:1], max_new_tokens=NEW)
    reference = Reference(small)
    drafted = [(text, drafts) for text, drafts in seen if drafts]
    assert len(drafted) > 3
    for text, drafts in drafted:
        assert drafts == reference(text, len(drafts))


def test_it_needs_no_memory_and_says_what_drafts():
    model = _model()
    fast, plain = _fast(model, EarlyExit(2, 3)), _fast(model, "none")
    caches = [{n: t.shape for n, t in f._engine.tensors.items() if "cache" in n} for f in (fast, plain)]
    assert caches[0] == caches[1]
    assert not any(name.startswith("drafter_") for name in fast._engine.tensors)
    assert "the target's layers [0, 1] draft" in str(fast.explain())


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_artifacts_give_the_same_tokens(backend, tmp_path):
    """In chains; in trees, together with heads: `tests/exactness/test_heads.py`."""
    model = _model()
    fast = _fast(model, EarlyExit(2, 3), backend=backend)
    expected = fast.generate(PROMPTS, max_new_tokens=NEW)
    reference = Reference(model)
    assert expected == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    pytest.importorskip("onnxruntime")
    fast.export_onnx(tmp_path / "onnx")
    loaded = emssd_compile.load(tmp_path / "onnx")
    assert loaded.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert loaded.stats.num_accepted_draft_tokens == fast.stats.num_accepted_draft_tokens > 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "layers=0 is out of range; pass at least 1"),
        ((), "must be ascending"),
        ((1, 2), "with layer 0 among them"),
        ((0, 2, 1), "must be ascending"),
        ((0, 0), "each once"),
        ((0, -1), "out of range"),
        ("01", "is not an integer"),
        ((0, 1.5), "is not an integer"),
    ],
)
def test_layers_that_cannot_be_meant_are_refused(layers, message):
    with pytest.raises(OptionError, match=message):
        EarlyExit(layers)


def test_layers_that_the_target_does_not_have_are_refused():
    with pytest.raises(OptionError, match="the model has layers 0 to 3"):
        _fast(_model(), EarlyExit((0, 4)))
    with pytest.raises(UnsupportedModelError, match="no list of layers was found"):
        _fast(model_with_attention(), EarlyExit(1), max_length=48)


def test_a_drafter_that_does_not_say_so_cannot_write_to_the_targets_cache():
    class Sly(EarlyExit):
        writes_kv = False

    with pytest.raises(DrafterError, match="KeyError"):
        _fast(_model(), Sly(2))
    assert context([[1]], 1).caches == {}


def test_weights_that_are_replaced_draft_in_forms_that_are_made_later_too():
    model, other = _model(), toy_model("llama", num_hidden_layers=LAYERS, seed=1)
    fast = _fast(model, EarlyExit(LAYERS, 3))
    fast.generate(PROMPTS[:1], max_new_tokens=NEW)
    model.load_state_dict(other.state_dict(), assign=True)
    several: list[dict[str, Any]] = [{}, {"min_new_tokens": 1}]  # the second is another form of the step
    for options in several:
        fast.stats.reset()
        (text,) = fast.generate(PROMPTS[:1], max_new_tokens=NEW, **options)
        assert text == [*PROMPTS[0], *Reference(other)(PROMPTS[0], NEW)]
        assert fast.stats.mean_acceptance_length > 3
