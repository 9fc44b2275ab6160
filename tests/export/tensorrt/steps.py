"""The smallest steps there are, in the form that TensorRT takes."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from emssd_compile.passes.graph import inputs
from emssd_compile.passes.manager import tidy
from emssd_compile.passes.tile_attention import TileAttention
from tests.passes.graphs import VOCABULARY, Scripted, step_of

CHUNK = 48
"""Most tokens of a step."""


def tiled_step() -> fx.GraphModule:
    """The tiled step of a model with one attention, which drafts two tokens."""
    step = step_of(Scripted([7, 8]))
    TileAttention(CHUNK).run(step)
    tidy(step, inputs(step.graph)[0].meta["val"].fake_mode)
    return step


def zeros(node: fx.Node, length: int) -> Tensor:
    """Zeros for an input; where its length may differ, it is an `arange` of that length."""
    value: Tensor = node.meta["val"]
    if any(isinstance(size, torch.SymInt) for size in value.shape):
        return torch.arange(length)
    return torch.zeros([int(size) for size in value.shape], dtype=value.dtype)


def example(step: fx.GraphModule, length: int = 8) -> dict[str, Tensor]:
    """Inputs of `tiled_step`: of three rows, two read a prompt of three tokens and of one."""
    values = {str(node.target): zeros(node, length) for node in inputs(step.graph)}
    history = torch.randint(VOCABULARY, values["history"].shape, generator=torch.Generator().manual_seed(0))
    return values | {
        "history": history,
        "known": torch.tensor([3, 0, 1]),
        "active": torch.tensor([True, False, True]),
        "limits": torch.full((3,), 20),
        "draft_budget": torch.tensor(6),
    }
