"""Random sequences of changes to a model, and of states to call it in: each answer is right or a named refusal.

`EMSSD_CHANGES=2000 pytest tests/exactness/test_changes.py` tries as many sequences.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import emssd_compile
from emssd_compile.errors import InvalidInputError, StaleModelError
from tests.exactness.models import Reference, prompt
from tests.zoo import toy_model

NUM_SEQUENCES = int(os.environ.get("EMSSD_CHANGES", "40"))
PROMPT, NEW = prompt(7), 3


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16 by default": lambda: _default_dtype(torch.bfloat16),
    "float64 by default": lambda: _default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
}


class Subject:
    """A model with two adapters, what was compiled of it, and the state that it was compiled in."""

    def __init__(self) -> None:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        self.model = peft.get_peft_model(toy_model("llama"), config, adapter_name="first").eval()
        self.model.add_adapter("second", config)
        self.model.set_adapter("first")
        self.model.eval()  # what an adapter adds is in training mode
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2)
        self.handles: list[Any] = []
        self.adapter, self.merged, self.disabled = "first", "", False
        self.values = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.fast = emssd_compile.optimize(
            self.model, "none", max_batch=1, max_length=32, backend="eager", layout="packed"
        )
        self.compiled = self.state

    @property
    def state(self) -> tuple[Any, ...]:
        """What a step is compiled for."""
        hooks = tuple(handle.id for handle in self.handles)
        return self.adapter, self.merged, self.disabled, hooks, next(self.model.parameters()).dtype

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def restore(self) -> None:
        """As at first, but for where the weights lie."""
        while self.handles:
            self.handles.pop().remove()
        self.model.float().eval()
        if self.merged:
            self.unmerge()
        if self.disabled:
            self.enable()
        self.set_adapter("first")
        self.model.load_state_dict(self.values)
        if self.compiled != self.state:
            self.refresh()

    # Changes that are followed.

    @torch.no_grad()
    def add(self, index: int) -> None:
        weight = self.weights[index % len(self.weights)]
        weight.add_(torch.randn_like(weight) * 0.1)

    def multiply_data(self, index: int) -> None:
        self.weights[index % len(self.weights)].data.mul_(0.7)

    def other_data(self, index: int) -> None:
        weight = self.weights[index % len(self.weights)]
        weight.data = torch.randn_like(weight.data) * 0.3

    def multiply_in_inference_mode(self, index: int) -> None:
        with torch.inference_mode():
            self.weights[index % len(self.weights)].mul_(1.2)

    def load(self, index: int) -> None:
        state = self.model.state_dict()
        self.model.load_state_dict(
            {n: v + torch.randn_like(v) * 0.05 for n, v in state.items()}, assign=bool(index % 2)
        )

    def train_a_step(self, index: int) -> None:
        self.model.train().requires_grad_(True)
        dtype = next(self.model.parameters()).dtype
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        if dtype == torch.float32 and not self.merged:
            self.model(torch.tensor([PROMPT])).logits.logsumexp(-1).sum().mul(1e-3).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()

    def freeze(self, index: int) -> None:
        self.model.requires_grad_(bool(index % 2))

    def multiply_a_buffer(self, index: int) -> None:
        for buffer in self.model.buffers():
            buffer.data.mul_(0.9)

    # Changes that a step is compiled for.

    def set_adapter(self, name: str) -> None:
        if not self.merged:
            self.model.set_adapter(name)
            self.adapter = name

    def switch(self, index: int) -> None:
        self.set_adapter(("first", "second")[index % 2])

    def merge(self, index: int) -> None:
        if not self.merged and not self.disabled:
            self.model.merge_adapter()
            self.merged = self.adapter

    def unmerge(self, index: int = 0) -> None:
        if self.merged:
            self.model.unmerge_adapter()
            self.merged = ""

    def disable(self, index: int) -> None:
        if not self.merged:
            self.model.base_model.disable_adapter_layers()
            self.disabled = True

    def enable(self, index: int = 0) -> None:
        if self.disabled:
            self.model.base_model.enable_adapter_layers()
            self.disabled = False

    def hook(self, index: int) -> None:
        modules = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.handles.append(modules[index % len(modules)].register_forward_hook(lambda m, given, out: out * 1.5))

    def unhook(self, index: int) -> None:
        if self.handles:
            self.handles.pop(index % len(self.handles)).remove()

    def cast(self, index: int) -> None:
        self.model.to((torch.bfloat16, torch.float32, torch.float32)[index % 3])

    def refresh(self, index: int = 0) -> None:
        if self.state == self.compiled or index % 10 == 0:  # to capture takes a second
            self.fast.refresh()
            self.compiled = self.state

    def generate(self, ambient: str) -> None:
        """Right, or refused for a reason."""
        try:
            with AMBIENT[ambient]():
                found = self.fast.generate([PROMPT], max_new_tokens=NEW)
        except StaleModelError:
            assert self.state != self.compiled, "what was compiled is what there is"
            return
        assert self.state == self.compiled
        if next(self.model.parameters()).dtype == torch.float32:
            assert found == [[*PROMPT, *Reference(self.model)(PROMPT, NEW)]]

    def training_is_refused(self) -> None:
        self.model.train()
        with pytest.raises(StaleModelError, match="training mode"):
            self.fast.generate([PROMPT], max_new_tokens=NEW)
        with pytest.raises(InvalidInputError, match="training mode"):
            self.fast.refresh()
        self.model.eval()


CHANGES = (
    *("add", "multiply_data", "other_data", "multiply_in_inference_mode", "load", "train_a_step", "freeze"),
    *("multiply_a_buffer", "switch", "merge", "unmerge", "disable", "enable", "hook", "unhook", "cast", "refresh"),
)


@functools.cache
def _subject() -> Subject:
    return Subject()


@settings(max_examples=NUM_SEQUENCES, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(CHANGES), st.integers(0, 59)),
            st.tuples(st.just("generate"), st.sampled_from(list(AMBIENT))),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(list(AMBIENT)),
)
def test_each_answer_is_right_or_a_named_refusal(changes, ambient):
    subject = _subject()
    subject.restore()
    for name, argument in changes:
        getattr(subject, name)(argument)
    subject.generate(ambient)


def test_training_mode_is_refused():
    subject = _subject()
    subject.restore()
    subject.training_is_refused()
