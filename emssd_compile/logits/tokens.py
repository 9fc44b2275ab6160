"""Lists of tokens, of different lengths side by side, as a value for each token of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def among(ids: Tensor, vocabulary: int) -> Tensor:
    """Bool `[n, V]`: which tokens are among `ids[n, m]`, where what is negative is none."""
    marks = torch.zeros(ids.shape[0], vocabulary + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter(1, _place(ids, vocabulary), True)[:, :vocabulary]


def counted(ids: Tensor, vocabulary: int) -> Tensor:
    """float32 `[n, V]`: how often each token is among `ids[n, m]`. Sums of ones are exact in whatever order."""
    counts = torch.zeros(ids.shape[0], vocabulary + 1, device=ids.device)
    ones = torch.ones(ids.shape, device=ids.device)
    return counts.scatter_add(1, _place(ids, vocabulary), ones)[:, :vocabulary]


def spread(ids: Tensor, values: Tensor, vocabulary: int) -> Tensor:
    """float32 `[n, V]`: `values[n, m]` where `ids[n, m]` say, 0 elsewhere. Equal ids have equal values."""
    found = torch.zeros(ids.shape[0], vocabulary + 1, device=ids.device)
    return found.scatter(1, _place(ids, vocabulary), values)[:, :vocabulary]


def _place(ids: Tensor, vocabulary: int) -> Tensor:
    """Where each goes: what is none, into a column behind the vocabulary."""
    return torch.where(ids < 0, vocabulary, ids)
