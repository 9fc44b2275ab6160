"""What the tensors of rows hold when requests start in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emssd_compile.runtime.requests import Request
from emssd_compile.step.signature import Binding


def first_values(requests: Sequence[Request], num_read: Sequence[int], capacity: int) -> dict[str, Tensor]:
    """The state of n rows in which these requests start, `[n]` or `[n, C]` each, by the names of the step's inputs.

    Args:
        requests: n requests.
        num_read: tokens of each prompt whose KV the row's cache holds already.
        capacity: C.
    """
    lengths = torch.tensor([len(request.prompt) for request in requests])  # [n]
    history = torch.zeros((len(requests), capacity), dtype=torch.int64)
    for line, request in zip(history, requests, strict=True):
        line[: len(request.prompt)] = request.prompt
    return {
        "history": history,
        "known": lengths,
        "lengths": torch.tensor(num_read),
        "draft_lengths": torch.zeros_like(lengths),
        "active": torch.ones_like(lengths, dtype=torch.bool),
        "limits": lengths + torch.tensor([request.max_new_tokens for request in requests]),
        "prompt_lengths": lengths,
        "groups": torch.tensor([r.index if r.group is None else r.group for r in requests]),
        "seeds": torch.tensor([request.seed for request in requests]),
    }


def option_values(requests: Sequence[Request], options: Mapping[str, Binding]) -> dict[str, Tensor]:
    """What n requests set for the parts of the step, or its default, `[n, *shape]` each.

    Args:
        requests: n requests.
        options: the step's inputs that hold options.
    """
    values = {}
    for name, binding in options.items():
        assert binding.option is not None
        own = name.removeprefix("option_")
        values[name] = binding.option.lines(request.options.get(own, binding.option.default) for request in requests)
    return values
