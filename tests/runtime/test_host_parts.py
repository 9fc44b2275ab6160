"""Parts are told on the host of requests that have ended, and steps read what the parts then know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import emssd_compile
from emssd_compile.drafters import Draft, DraftContext, Drafter, PartSizes, TensorSpec
from emssd_compile.errors import PartError
from tests.exactness.models import Reference
from tests.export.subjects import Small, prompt
from tests.runtime.engines import graph_engine
from tests.runtime.tape import TapeDevice

PROMPTS = [prompt(n) for n in (2, 5, 9)]
NEW = 6


class Recalls(Drafter):
    """Drafts the last token of the text that ended last."""

    num_draft_tokens = 1
    host_attributes = ("memory", "heard")

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(1, dtype=torch.int64)
        self.heard: list[tuple[list[int], int, Mapping[str, float | Tensor]]] = []

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"last": TensorSpec((1,), torch.int64, kept="host")}

    def host_tensors(self) -> dict[str, Tensor]:
        return {"last": self.memory}

    def ended(self, tokens: Tensor, prompt_length: int, options: Mapping[str, float | Tensor]) -> None:
        self.heard.append((tokens.tolist(), prompt_length, options))
        self.memory = tokens[-1:].clone()

    def forward(self, context: DraftContext) -> Draft:
        tokens = context.state["last"].expand(len(context.known))[:, None]
        return Draft(tokens.contiguous(), torch.ones_like(context.known))


def _fast(drafter: Drafter, **options: Any) -> emssd_compile.OptimizedModel:
    return emssd_compile.optimize(Small(), drafter, max_batch=2, max_length=64, backend="eager", **options)


@pytest.mark.parametrize("captured", [False, True], ids=["direct", "graphs"])
def test_each_request_is_told_of_once_with_what_it_set(captured):
    drafter, reference = Recalls(), Reference(Small())
    fast = _fast(drafter)
    if captured:
        fast._engine = graph_engine(fast, 24, TapeDevice())
        fast._engine.parts._launcher = fast._engine.launcher
    penalties = [1.0, 1.5, 1.0]
    fast.generate(PROMPTS, max_new_tokens=NEW, repetition_penalty=penalties)
    heard = sorted(drafter.heard, key=lambda told: told[1])
    assert [count for _, count, _ in heard] == [len(ids) for ids in PROMPTS]
    assert heard[0][0] == [*PROMPTS[0], *reference(PROMPTS[0], NEW)]
    assert [options.get("repetition_penalty", 1.0) for *_, options in heard] == penalties
    assert fast._engine.tensors["drafter_last"].tolist() == drafter.memory.tolist() == drafter.heard[-1][0][-1:]
    fast.generate(PROMPTS, max_new_tokens=NEW)
    assert len(drafter.heard) == 2 * len(PROMPTS), "what the host half of a part keeps may change"


def test_a_run_begins_with_what_parts_know():
    drafter = Recalls()
    fast = _fast(drafter, deterministic=True)
    drafter.memory = torch.tensor([7])
    fast.generate(PROMPTS, max_new_tokens=NEW)
    assert fast._engine.tensors["drafter_last"].tolist() == [7]
    assert not drafter.heard, "without a clock a call depends on itself alone"


def test_what_was_declared_otherwise_is_refused():
    drafter = Recalls()
    fast = _fast(drafter)
    drafter.memory = torch.zeros(2)
    with pytest.raises(
        PartError, match=r"Recalls.host_tensors gives 'last' as torch.float32 \[2\].* torch.int64 \[1\]"
    ):
        fast.generate(PROMPTS, max_new_tokens=NEW)
