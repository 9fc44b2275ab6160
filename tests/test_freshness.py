"""`freshness`: what changes after `optimize` is followed exactly, or refused by a name."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig

import emssd_compile
from emssd_compile.errors import StaleModelError
from tests.exactness.models import build
from tests.followed import NEW, PROMPT, assert_follows, compiled, query


@pytest.fixture
def model() -> Any:
    return build("llama")


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
    "used itself with a static cache": lambda model: model.generate(
        torch.tensor([PROMPT]), max_new_tokens=3, cache_implementation="static", disable_compile=True
    ),
    "compiled by transformers, too": lambda model: model.get_compiled_call(CompileConfig()),
    "train and back": lambda model: model.train().eval(),
}


@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED)
def test_weights_are_followed_exactly(model, change):
    fast = compiled(model)
    assert_follows(fast, model)
    change(model)
    assert_follows(fast, model)


@pytest.mark.parametrize("name", ["in place", "weight.data.mul_", "load_state_dict(assign=True)"])
def test_a_draft_model_is_followed(model, name):
    draft = build("llama")
    fast = compiled(model, draft)
    FOLLOWED[name](draft)
    fast.stats.reset()
    assert_follows(fast, model)
    worse = fast.stats.num_accepted_draft_tokens
    draft.load_state_dict(model.state_dict())
    fast.stats.reset()
    assert_follows(fast, model)
    assert fast.stats.num_accepted_draft_tokens == fast.stats.num_draft_tokens > worse


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a dtype": (lambda model: model.bfloat16(), "its dtype is torch.bfloat16, and was torch.float32"),
    "a device": (lambda model: model.to("meta"), "its device is meta, and was cpu"),
    "a shape": (
        lambda model: setattr(query(model), "weight", nn.Parameter(torch.randn(4, 4))), r"q_proj\.weight.* shape"
    ),
    "strides": (lambda model: setattr(query(model), "weight", nn.Parameter(torch.randn(64, 64).T)), "its stride is"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_tensor_that_does_not_fit_is_refused_by_name(model, change, message):
    fast = compiled(model)
    change(model)
    with pytest.raises(StaleModelError, match=rf"(?s){message}.*fast\.refresh\(\)"):
        fast.generate([PROMPT], max_new_tokens=NEW)


def test_a_weight_that_is_no_longer_tied_is_refused():
    model: Any = build("own-positions")
    model.head.weight = model.wte.weight
    fast = compiled(model)
    assert_follows(fast, model)
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
    with pytest.raises(StaleModelError, match=r"weight was one tensor in several places, and is several now"):
        fast.generate([PROMPT], max_new_tokens=NEW)


def test_refresh_captures_nothing_where_nothing_changed(model, monkeypatch):
    fast = compiled(model)
    monkeypatch.setattr("emssd_compile.compiler.capture", lambda *_: pytest.fail("captured"))
    _add_in_place(model)
    fast.refresh()
    assert_follows(fast, model)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_optimize_leaves_the_parameters_as_they_were(model, backend):
    before = {
        name: (p, p.data_ptr(), p.untyped_storage().nbytes(), p._version, p.requires_grad)
        for name, p in model.named_parameters()
    }
    values = copy.deepcopy(model.state_dict())
    compiled(model, backend=backend)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert (p.data_ptr(), p.untyped_storage().nbytes(), p._version, p.requires_grad) == before[name][1:]
        assert torch.equal(p, values[name])


def test_a_mask_in_a_buffer_is_looked_at_anew():
    """The graph holds what the mask means, not the mask."""
    model: Any = build("last-logits")
    fast = compiled(model)
    assert_follows(fast, model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert_follows(fast, model)  # the same values in another place
    model.bias.data.tril_(-3)
    with pytest.raises(StaleModelError, match="the values of bias are others"):
        fast.generate([PROMPT], max_new_tokens=NEW)


def test_a_tensor_that_is_no_buffer_is_looked_at_anew():
    model: Any = build("own-positions")
    model.factor = torch.ones(4)
    fast = compiled(model)
    assert_follows(fast, model)
    model.factor.mul_(2)
    with pytest.raises(StaleModelError, match=r"the values of OwnPositions\.factor are others"):
        fast.generate([PROMPT], max_new_tokens=NEW)


def test_inductor_follows_too(model):
    """Its compiled function, and the tensors that were replaced."""
    fast = compiled(model, backend="inductor")
    assert_follows(fast, model)
    for name in ("in place", "weight.data.mul_", "weight.data =", "load_state_dict(assign=True)", "optimizer.step"):
        FOLLOWED[name](model)
        assert_follows(fast, model)


def test_the_model_may_be_let_go_of_and_a_part_of_it_may_not():
    model: Any = build("llama")
    fast = emssd_compile.optimize(model, "none", max_batch=1, max_length=32, backend="eager")
    expected = fast.generate([[5, 6, 7]], max_new_tokens=4)
    layer = model.model.layers[1]
    del model
    gc.collect()
    assert fast.generate([[5, 6, 7]], max_new_tokens=4) == expected
    weight = layer.mlp.up_proj.weight
    del layer.mlp.up_proj.weight
    with pytest.raises(StaleModelError, match="weight"):
        fast.generate([[5, 6, 7]], max_new_tokens=4)
    layer.mlp.up_proj.weight = weight
    assert fast.generate([[5, 6, 7]], max_new_tokens=4) == expected
    layer.half()
    with pytest.raises(StaleModelError, match=r"its dtype is torch\.float16"):
        fast.generate([[5, 6, 7]], max_new_tokens=4)
