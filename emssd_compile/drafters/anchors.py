"""Where in a text that is learnt from there are blocks: a head for each place would be too much."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_ANCHORS = 512
"""Of a window that is learnt from, at most so many places have a block behind them."""


def choose_anchors(tokens: Tensor, *, at_random: bool) -> Tensor:
    """int64 `[A]`, ascending places of windows `[B, S]`: all, or if they are too many, some drawn or evenly spread."""
    size = tokens.shape[1]
    if size <= MOST_ANCHORS:
        return torch.arange(size, device=tokens.device)
    if at_random:
        return torch.randperm(size, device=tokens.device)[:MOST_ANCHORS].sort().values
    return torch.arange(MOST_ANCHORS, device=tokens.device) * size // MOST_ANCHORS


def at_anchors(anchors: Tensor, values: Tensor, tokens: Tensor, elsewhere: float) -> Tensor:
    """Of windows `[B, S]`, values `[B, A, ...]` at the anchors `[A]`, and something else elsewhere: `[B, S, ...]`."""
    if len(anchors) == tokens.shape[1]:
        return values
    return values.new_full((*tokens.shape, *values.shape[2:]), elsewhere).index_copy(1, anchors, values)
