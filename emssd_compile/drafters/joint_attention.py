"""Tokens that go through a layer together, though they attend in parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from emssd_compile.drafters.decoder_layer import Attend
from emssd_compile.drafters.head_attention import Cache, NodeAttention
from emssd_compile.step.pack import pack_each


def in_turn(attends: Sequence[Attend], sizes: Sequence[int]) -> Attend:
    """Attention of parts that lie behind one another, so many tokens each: a part sees what those before it wrote.

    So the weights of a layer are read once for all parts, and each part has the form that attention knows.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = accumulate(sizes)
        parts = [[x[end - size : end] for x in (q, k, v)] for size, end in zip(sizes, ends, strict=True)]
        return torch.cat([one(*part) for one, part in zip(attends, parts, strict=True)])

    return attend


def over_nodes(caches: Sequence[Cache], positions: Tensor, going: Tensor) -> list[Attend]:
    """Attention of each layer for chains of n tokens, one of each row that is going: `[B * n, heads, D]` each.

    Args:
        caches: of the layers.
        positions: int64 `[B, n]`, consecutive; all slots before a row's first one are seen.
        going: bool `[B]`; what the others get is rubbish.
    """
    lengths = torch.where(going, positions[:, 0], 0)  # [B]
    which = torch.arange(positions.numel(), device=positions.device).view(positions.shape)
    packed, order = pack_each(which, positions, going)

    def over(cache: Cache) -> Attend:
        nodes = NodeAttention(cache, packed, order, lengths)
        return lambda *qkv: nodes(*(x.unflatten(0, positions.shape) for x in qkv)).flatten(0, 1)

    return [over(cache) for cache in caches]
