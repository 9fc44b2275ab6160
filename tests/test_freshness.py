"""`freshness`: what changes after `optimize` is followed exactly, or refused by a name."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import emssd_compile
from emssd_compile.errors import StaleModelError
from tests.exactness.models import WIDTH, Reference, build, prompt

PROMPT, NEW = prompt(17), 8


@pytest.fixture
def model() -> Any:
    return build("llama")


def _optimize(model: Any, drafter: str | nn.Module = "none", **options: object) -> emssd_compile.OptimizedModel:
    given = {"max_batch": 2, "max_length": 64, "backend": "eager", "layout": "packed", **options}
    return emssd_compile.optimize(model, drafter, **given)  # type: ignore[arg-type]


def _assert_follows(fast: emssd_compile.OptimizedModel, model: Any) -> None:
    assert fast.generate([PROMPT], max_new_tokens=NEW) == [[*PROMPT, *Reference(model)(PROMPT, NEW)]]


def _query(model: Any) -> Any:
    return model.model.layers[0].self_attn.q_proj


@torch.no_grad()
def _add_in_place(model: Any) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)


def _step_of_an_optimizer(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _write_into_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(torch.randn(()) + 1.5)


def _put_other_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter.data) * 0.3


def _other(model: Any) -> dict[str, torch.Tensor]:
    return {name: value + torch.randn_like(value) * 0.2 for name, value in model.state_dict().items()}


FOLLOWED: dict[str, Callable[[Any], object]] = {
    "in place": _add_in_place,
    "optimizer.step": _step_of_an_optimizer,
    "weight.data.mul_": _write_into_data,
    "weight.data =": _put_other_data,
    "load_state_dict": lambda model: model.load_state_dict(_other(model)),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(_other(model), assign=True),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "another generation_config": lambda model: setattr(model.generation_config, "top_k", 7),
    "a padding token": lambda model: setattr(model.config, "pad_token_id", 3),
    "used itself": lambda model: model.generate(torch.tensor([PROMPT]), max_new_tokens=3),
    "train and back": lambda model: model.train().eval(),
}


@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED)
def test_weights_are_followed_exactly(model, change):
    fast = _optimize(model)
    _assert_follows(fast, model)
    change(model)
    _assert_follows(fast, model)


@pytest.mark.parametrize("name", ["in place", "weight.data.mul_", "load_state_dict(assign=True)"])
def test_a_draft_model_is_followed(model, name):
    draft = build("llama")
    fast = _optimize(model, draft)
    FOLLOWED[name](draft)
    fast.stats.reset()
    _assert_follows(fast, model)
    worse = fast.stats.num_accepted_draft_tokens
    draft.load_state_dict(model.state_dict())
    fast.stats.reset()
    _assert_follows(fast, model)
    assert fast.stats.num_accepted_draft_tokens == fast.stats.num_draft_tokens > worse


def _hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def _replace_module(model: Any) -> None:
    layer = model.model.layers[0].self_attn
    layer.q_proj = _Doubled(layer.q_proj.in_features, layer.q_proj.out_features, bias=False)


def _forward_of_an_instance(model: Any) -> None:
    query = _query(model)
    query.forward = lambda x: nn.functional.linear(x, query.weight) * 2


def _add_bias(model: Any) -> None:
    _query(model).bias = nn.Parameter(torch.ones(len(_query(model).weight)))


def _untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hook": (lambda model: _query(model).register_forward_hook(_hook), r"q_proj\._forward_hooks.* is new"),
    "a hook before": (lambda model: _query(model).register_forward_pre_hook(lambda m, a: None), "_forward_pre_hooks"),
    "a forward": (_forward_of_an_instance, r"q_proj\.forward is new"),
    "a module": (_replace_module, r"q_proj"),
    "a class": (lambda model: setattr(_query(model), "__class__", _Doubled), "is a _Doubled, and was a Linear"),
    "a dtype": (lambda model: model.bfloat16(), "its dtype is torch.bfloat16, and was torch.float32"),
    "a device": (lambda model: model.to("meta"), "its device is meta, and was cpu"),
    "training mode": (lambda model: model.train(), "training mode"),
    "training mode of a part": (lambda model: _query(model).train(), r"q_proj\.training has changed from False"),
    "the configuration": (
        lambda model: setattr(model.config, "_attn_implementation", "eager"), "attn_implementation.* has changed"
    ),
    "an attribute": (
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.0), "scaling has changed from .* to 1.0"
    ),
    "a shape": (
        lambda model: setattr(_query(model), "weight", nn.Parameter(torch.randn(4, 4))), r"q_proj\.weight.* shape"
    ),
    "strides": (lambda model: setattr(_query(model), "weight", nn.Parameter(torch.randn(64, 64).T)), "its stride is"),
    "a bias": (_add_bias, "bias came or went"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(model, change, message):
    fast = _optimize(model)
    change(model)
    with pytest.raises(StaleModelError, match=rf"(?s){message}.*fast\.refresh\(\)"):
        fast.generate([PROMPT], max_new_tokens=NEW)


@pytest.mark.parametrize("name", ["a hook", "a forward", "a module", "an attribute", "the configuration", "a bias"])
def test_refresh_compiles_the_model_as_it_is_now(model, name):
    fast = _optimize(model)
    before = fast.generate([PROMPT], max_new_tokens=NEW)
    REFUSED[name][0](model)
    fast.refresh()
    _assert_follows(fast, model)
    assert name == "the configuration" or fast.generate([PROMPT], max_new_tokens=NEW) != before


def test_what_is_undone_is_as_if_it_had_not_been(model):
    fast = _optimize(model)
    handle = _query(model).register_forward_hook(_hook)
    with pytest.raises(StaleModelError):
        fast.generate([PROMPT], max_new_tokens=NEW)
    handle.remove()
    _assert_follows(fast, model)


def test_refresh_captures_nothing_where_nothing_changed(model, monkeypatch):
    fast = _optimize(model)
    monkeypatch.setattr("emssd_compile.compiler.capture", lambda *_: pytest.fail("captured"))
    _add_in_place(model)
    fast.refresh()
    _assert_follows(fast, model)


def test_a_model_that_is_refused_leaves_what_was_compiled(model):
    fast = _optimize(model)
    scaling = model.model.layers[0].self_attn.scaling
    handle = _query(model).register_forward_hook(lambda m, a, out: out.cumsum(1))
    with pytest.raises(emssd_compile.errors.UnsupportedModelError):
        fast.refresh()
    handle.remove()
    assert scaling == model.model.layers[0].self_attn.scaling
    _assert_follows(fast, model)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_optimize_leaves_the_parameters_as_they_were(model, backend):
    before = {
        name: (p, p.data_ptr(), p.untyped_storage().nbytes(), p._version, p.requires_grad)
        for name, p in model.named_parameters()
    }
    values = copy.deepcopy(model.state_dict())
    _optimize(model, backend=backend)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert (p.data_ptr(), p.untyped_storage().nbytes(), p._version, p.requires_grad) == before[name][1:]
        assert torch.equal(p, values[name])


def test_a_mask_in_a_buffer_is_looked_at_anew():
    """The graph holds what the mask means, not the mask."""
    model: Any = build("last-logits")
    fast = _optimize(model)
    _assert_follows(fast, model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    _assert_follows(fast, model)  # the same values in another place
    model.bias.data.tril_(-3)
    with pytest.raises(StaleModelError, match="the values of bias are others"):
        fast.generate([PROMPT], max_new_tokens=NEW)


def test_a_tensor_that_is_no_buffer_is_looked_at_anew():
    model: Any = build("own-positions")
    model.factor = torch.ones(4)
    fast = _optimize(model)
    _assert_follows(fast, model)
    model.factor.mul_(2)
    with pytest.raises(StaleModelError, match=r"the values of OwnPositions\.factor are others"):
        fast.generate([PROMPT], max_new_tokens=NEW)


def test_hooks_of_all_modules_count(model):
    fast = _optimize(model)
    with (
        torch.nn.modules.module.register_module_forward_hook(lambda m, a, out: None),
        pytest.raises(StaleModelError, match="the hooks of all modules"),
    ):
        fast.generate([PROMPT], max_new_tokens=NEW)
    _assert_follows(fast, model)


def test_inductor_follows_too(model):
    """Its packed copies, its compiled function, and the tensors that were replaced."""
    fast = _optimize(model, backend="inductor")
    _assert_follows(fast, model)
    for name in ("in place", "weight.data.mul_", "weight.data =", "load_state_dict(assign=True)", "optimizer.step"):
        FOLLOWED[name](model)
        _assert_follows(fast, model)


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
    fast = _optimize(adapted)
    _assert_follows(fast, adapted)
    change(adapted.mlp, monkeypatch)
    with pytest.raises(StaleModelError):
        fast.generate([PROMPT], max_new_tokens=NEW)
    fast.refresh()
    _assert_follows(fast, adapted)


def test_weights_of_a_module_in_a_list_are_followed(adapted: Any) -> None:
    fast = _optimize(adapted)
    linear = adapted.mlp.adapters[0]
    linear.weight.data = torch.randn(WIDTH, WIDTH)
    _assert_follows(fast, adapted)
    linear.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    _assert_follows(fast, adapted)


@dataclass(slots=True)
class _Slotted:
    factor: float = 2.0


def _factor_of_a_hook(model: Any) -> Callable[[], None]:
    factors = [2.0]
    _query(model).register_forward_hook(lambda module, args, output: output * factors[0])
    return lambda: factors.__setitem__(0, -3.0)


def _rebound_factor_of_a_hook(model: Any) -> Callable[[], None]:
    factor = 2.0

    def change() -> None:
        nonlocal factor
        factor = -3.0

    _query(model).register_forward_hook(lambda module, args, output: output * factor)
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
    fast = _optimize(model)
    _assert_follows(fast, model)
    change()
    with pytest.raises(StaleModelError, match="has changed"):
        fast.generate([PROMPT], max_new_tokens=NEW)
