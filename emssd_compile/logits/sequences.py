"""Sequences of tokens of which a text may hold all but the last."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.step.logits import LogitContext


def completing(context: LogitContext, sequences: Tensor) -> Tensor:
    """int64 `[R, S]`: the token that would complete each sequence; -1 where the text does not end in the rest of it.

    As in transformers, a text that is nothing but the rest of a sequence is too short for it.

    Args:
        context: the logits, and the text before each.
        sequences: int64 `[R, S, L]`, those of each logit's row, aligned at their ends, -1 before them.
    """
    rest, last = sequences[:, :, :-1], sequences[:, :, -1]
    newest = context.newest(rest.shape[2])[:, None]  # [R, 1, L - 1]
    fits = (sequences >= 0).sum(2) <= context.positions[:, None]  # [R, S]
    return torch.where(((rest == newest) | (rest < 0)).all(2) & fits, last, -1)
