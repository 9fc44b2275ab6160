"""Compute in another precision than a model's own, without touching its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating dtype that rounds most; float32 if there is none."""
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps, default=torch.float32)


class Precision(TorchDispatchMode):
    """Within this context every op computes in `dtype` at least: coarser inputs are converted on their way in.

    Weights are converted for one op at a time, so this takes little memory. Results come out in `dtype`. To be used
    under `torch.no_grad()`: views of weights cannot be made here under `torch.inference_mode()`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.eps = torch.finfo(dtype).eps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Convert what is coarser, values and dtypes alike, and run the op."""
        return func(*tree_map(self._finer, args), **tree_map(self._finer, kwargs or {}))

    def _finer(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self._is_coarser(value.dtype):
            return value.to(self.dtype)
        return self.dtype if isinstance(value, torch.dtype) and self._is_coarser(value) else value

    def _is_coarser(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and torch.finfo(dtype).eps > self.eps


__all__ = ["Precision", "coarsest"]
