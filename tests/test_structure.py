"""`structure`: what changes beside the weights after `optimize` is refused by a name, and `refresh` compiles anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import emssd_compile
from emssd_compile.errors import StaleModelError
from tests.exactness.models import WIDTH, build
from tests.followed import NEW, PROMPT, assert_follows, compiled, query


@pytest.fixture
def model() -> Any:
    return build("llama")


def _hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def _replace_module(model: Any) -> None:
    layer = model.model.layers[0].self_attn
    layer.q_proj = _Doubled(layer.q_proj.in_features, layer.q_proj.out_features, bias=False)


def _forward_of_an_instance(model: Any) -> None:
    linear = query(model)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) * 2


def _add_bias(model: Any) -> None:
    query(model).bias = nn.Parameter(torch.ones(len(query(model).weight)))


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hook": (lambda model: query(model).register_forward_hook(_hook), r"q_proj\._forward_hooks.* is new"),
    "a hook before": (lambda model: query(model).register_forward_pre_hook(lambda m, a: None), "_forward_pre_hooks"),
    "a forward": (_forward_of_an_instance, r"q_proj\.forward is new"),
    "a module": (_replace_module, r"q_proj"),
    "a class": (lambda model: setattr(query(model), "__class__", _Doubled), "is a _Doubled, and was a Linear"),
    "training mode": (lambda model: model.train(), "training mode"),
    "training mode of a part": (lambda model: query(model).train(), r"q_proj\.training has changed from False"),
    "the configuration": (
        lambda model: setattr(model.config, "_attn_implementation", "eager"), "attn_implementation.* has changed"
    ),
    "an attribute": (
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.0), "scaling has changed from .* to 1.0"
    ),
    "a bias": (_add_bias, "bias came or went"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(model, change, message):
    fast = compiled(model)
    change(model)
    with pytest.raises(StaleModelError, match=rf"(?s){message}.*fast\.refresh\(\)"):
        fast.generate([PROMPT], max_new_tokens=NEW)


@pytest.mark.parametrize("name", ["a hook", "a module", "the configuration"])
def test_refresh_compiles_the_model_as_it_is_now(model, name):
    fast = compiled(model)
    before = fast.generate([PROMPT], max_new_tokens=NEW)
    REFUSED[name][0](model)
    fast.refresh()
    assert_follows(fast, model)
    assert name == "the configuration" or fast.generate([PROMPT], max_new_tokens=NEW) != before


def test_what_is_undone_is_as_if_it_had_not_been(model):
    fast = compiled(model)
    handle = query(model).register_forward_hook(_hook)
    with pytest.raises(StaleModelError):
        fast.generate([PROMPT], max_new_tokens=NEW)
    handle.remove()
    assert_follows(fast, model)


def test_a_model_that_is_refused_leaves_what_was_compiled(model):
    fast = compiled(model)
    scaling = model.model.layers[0].self_attn.scaling
    handle = query(model).register_forward_hook(lambda m, a, out: out.cumsum(1))
    with pytest.raises(emssd_compile.errors.UnsupportedModelError):
        fast.refresh()
    handle.remove()
    assert scaling == model.model.layers[0].self_attn.scaling
    assert_follows(fast, model)


def test_hooks_of_all_modules_count(model):
    fast = compiled(model)
    with (
        torch.nn.modules.module.register_module_forward_hook(lambda m, a, out: None),
        pytest.raises(StaleModelError, match="the hooks of all modules"),
    ):
        fast.generate([PROMPT], max_new_tokens=NEW)
    assert_follows(fast, model)


class _Adapted(nn.Module):
    """Beside a module: one in a plain list, an attribute of the class, and tables under names that others use."""

    scale = 1.0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.adapters = [nn.Linear(WIDTH, WIDTH).eval()]
        self._cache = torch.ones(WIDTH)
        self.settings = {"use_cache": 1.0}

    def adapt(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapters[0](x) * self.scale * self._cache * self.settings["use_cache"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.adapt(x)


@pytest.fixture
def adapted() -> Any:
    model: Any = build("own-positions")
    model.mlp = _Adapted(model.mlp).eval()
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp, patch: patch.setattr(_Adapted, "scale", -3.0),
        lambda mlp, patch: patch.setattr(_Adapted, "adapt", lambda self, x: -x),
        lambda mlp, patch: mlp.__dict__.update(_cache=torch.randn(WIDTH) * 5),
        lambda mlp, patch: mlp.settings.update(use_cache=-3.0),
        lambda mlp, patch: setattr(mlp.adapters[0], "bias", None),
        lambda mlp, patch: mlp.adapters[0].register_forward_hook(lambda module, given, result: -result),
    ],
    ids=["attribute of the class", "method of the class", "_cache", "use_cache", "bias in a list", "hook in a list"],
)
def test_what_a_forward_reads_beside_its_modules_is_refused(
    adapted: Any, change: Callable[[Any, pytest.MonkeyPatch], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = compiled(adapted)
    assert_follows(fast, adapted)
    change(adapted.mlp, monkeypatch)
    with pytest.raises(StaleModelError):
        fast.generate([PROMPT], max_new_tokens=NEW)
    fast.refresh()
    assert_follows(fast, adapted)


def test_weights_of_a_module_in_a_list_are_followed(adapted: Any) -> None:
    fast = compiled(adapted)
    linear = adapted.mlp.adapters[0]
    linear.weight.data = torch.randn(WIDTH, WIDTH)
    assert_follows(fast, adapted)
    linear.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    assert_follows(fast, adapted)


@dataclass(slots=True)
class _Slotted:
    factor: float = 2.0


def _factor_of_a_hook(model: Any) -> Callable[[], None]:
    factors = [2.0]
    query(model).register_forward_hook(lambda module, args, output: output * factors[0])
    return lambda: factors.__setitem__(0, -3.0)


def _rebound_factor_of_a_hook(model: Any) -> Callable[[], None]:
    factor = 2.0

    def change() -> None:
        nonlocal factor
        factor = -3.0

    query(model).register_forward_hook(lambda module, args, output: output * factor)
    return change


def _slotted_settings(model: Any) -> Callable[[], None]:
    model.settings = _Slotted()
    return lambda: setattr(model.settings, "factor", -3.0)


def _deque_of_factors(model: Any) -> Callable[[], None]:
    model.factors = deque([2.0])
    return lambda: model.factors.append(-3.0)


@pytest.mark.parametrize(
    "prepare", [_factor_of_a_hook, _rebound_factor_of_a_hook, _slotted_settings, _deque_of_factors]
)
def test_what_hangs_on_modules_is_compared_wherever_it_is_kept(model, prepare):
    change = prepare(model)
    fast = compiled(model)
    assert_follows(fast, model)
    change()
    with pytest.raises(StaleModelError, match="has changed"):
        fast.generate([PROMPT], max_new_tokens=NEW)


@pytest.mark.parametrize(
    "computed",
    [
        weight_norm,
        spectral_norm,
        lambda linear: prune.random_unstructured(linear, "weight", 0.3),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "prune", "parametrized weight_norm", "parametrized spectral_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated:FutureWarning")
def test_a_weight_that_each_forward_computes_is_followed_through_what_it_is_computed_from(computed):
    model: Any = build("own-positions")
    computed(model.query)
    model.eval()
    fast = compiled(model)
    assert_follows(fast, model)
    with torch.no_grad():
        for parameter in model.query.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert_follows(fast, model)  # the reference has run the model, which computes the weight
    assert_follows(fast, model)
