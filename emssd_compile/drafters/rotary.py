"""Rotary position embeddings of draft heads (2104.09864)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches positions: slow frequencies by `factor`, fast ones not at all, those between in part.

    Attributes:
        factor: of the slow frequencies.
        low_freq_factor, high_freq_factor: a frequency is slow, or fast, if it turns less, or more, often than this in
            `original_length` tokens.
        original_length: tokens that the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __call__(self, frequency: float) -> float:
        """What takes the place of an angle a token, in radians."""
        turns = self.original_length * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Rotary:
    """Turns pairs of elements, i and i + D / 2, of queries and keys by angles in proportion to the position.

    Attributes:
        theta: pair i turns by `theta ** (-2 i / D)` radians a token.
        scaling: what is done to these angles; None for nothing.
        share: of the D elements of a head that is turned, the first ones; the others stay as they are.
    """

    theta: float = 10000.0
    scaling: Llama3Scaling | None = None
    share: float = 1.0

    def __call__(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys `[..., heads, D]` turned by their `positions[...]`; computed in float32."""
        size = int(heads.shape[-1] * self.share)
        plain = [self.theta ** (-2 * pair / size) for pair in range(size // 2)]
        per_token = torch.tensor([self.scaling(f) if self.scaling else f for f in plain], device=heads.device)
        angles = positions[..., None, None].to(torch.float32) * per_token  # [..., 1, D / 2]
        cos, sin = angles.cos(), angles.sin()
        first, second = heads[..., :size].float().chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(heads.dtype)
        return turned if size == heads.shape[-1] else torch.cat([turned, heads[..., size:]], -1)
