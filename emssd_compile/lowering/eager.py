"""Run the step graph op by op: nothing to wait for, and what every other backend is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from emssd_compile.lowering.toolchain import require_cache


def require(device: torch.device) -> None:
    """Raises BackendError if torch has no folder for its caches, which it wants to capture a model."""
    require_cache()


def passes(device: torch.device) -> tuple[()]:
    """None: the graph runs as it is."""
    return ()


def lower(graph_module: fx.GraphModule, deterministic: bool = False) -> Callable[..., dict[str, Tensor]]:
    """The graph module itself."""
    return graph_module
