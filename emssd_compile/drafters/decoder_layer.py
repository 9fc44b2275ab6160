"""Decoder layers of draft heads: RMS norms, rotary positions, grouped heads, a gated MLP.

A layer does not know what its tokens attend to: it calls an `Attend`. So the same weights run over packed rows with
caches of their own, and over whole texts to be trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.drafters.rotary import Rotary
from emssd_compile.errors import DrafterError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries `[..., Hq, D]`, keys and values `[..., Hkv, D]`, all turned by their positions) -> `[..., Hq, D]`."""


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a decoder layer, and which of its kinds it is.

    Attributes:
        width: H, of what goes through the layers.
        inner: of the MLP.
        heads, kv_heads: Hq and Hkv.
        head_size: D.
        epsilon: added to the mean square in norms.
        rotary: how positions turn queries and keys.
        has_head_norms: whether queries and keys are normalised head by head (Qwen3).
        has_qkv_bias, has_output_bias, has_mlp_bias: whether these projections have one.
        longest: tokens of a row that it was trained to tell positions of; None where nothing is said.
        is_gated: whether what is attended with is multiplied by the sigmoid of as many more queries (Qwen3-Next).
    """

    width: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float = 1e-6
    rotary: Rotary = field(default_factory=Rotary)
    has_head_norms: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    is_gated: bool = False
    longest: int | None = None

    @classmethod
    def as_wide_as(cls, width: int) -> Self:
        """A layer for a head to be trained."""
        size = next(size for size in (128, 64, 32, 16, 8, 4, 2) if width % size == 0)
        return cls(width, 3 * width, width // size, width // size, size)

    def check_reach(self, kind: str, capacity: int) -> None:
        """Raises DrafterError if rows of so many tokens have positions that the layer was not trained for."""
        if self.longest is not None and capacity > self.longest:
            raise DrafterError(
                f"the {kind} was made for {self.longest} positions, as max_position_embeddings of its config says, and "
                f"rows have up to {capacity} tokens: pass max_length={self.longest} or less, or say there how far it "
                "reaches"
            )

    def norm(self, width: int | None = None) -> RMSNorm:
        """A norm of H elements, or of as many as are given."""
        return RMSNorm(width or self.width, self.epsilon)


def normalized(x: Tensor, epsilon: float) -> Tensor:
    """Vectors `[..., width]` divided by their root mean square, which is taken in float32; in the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`; the mean is taken in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]`, in the dtype of `x`."""
        return normalized(x, self.epsilon) * self.weight


class Attention(nn.Module):
    """Projections, norms and rotary positions around an `Attend`.

    Args:
        sizes: of the layer.
        width: of what is attended with; H if None.
    """

    def __init__(self, sizes: LayerSizes, width: int | None = None) -> None:
        super().__init__()
        queries, keys = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
        self.head_size, self.rotary, self.is_gated = sizes.head_size, sizes.rotary, sizes.is_gated
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width or sizes.width, n, bias=sizes.has_qkv_bias)
            for n in (queries * (1 + sizes.is_gated), keys, keys)
        )
        self.o_proj = nn.Linear(queries, sizes.width, bias=sizes.has_output_bias)
        self.q_norm, self.k_norm = (
            sizes.norm(sizes.head_size) if sizes.has_head_norms else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`[..., H]` for tokens `x[..., width]` at `positions[...]`."""
        q = self._heads(self.q_proj, x, self.head_size * (1 + self.is_gated))
        q, gate = q.chunk(2, -1) if self.is_gated else (q, None)  # [..., Hq, D]
        q = self.rotary(self.q_norm(q), positions)
        attended = attend(q, *self.keys_and_values(x, positions))  # [..., Hq, D]
        if gate is not None:
            attended = attended * gate.sigmoid()
        result: Tensor = self.o_proj(attended.flatten(-2))
        return result

    def keys_and_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What others see of tokens `x[..., width]` at `positions[...]`, `[..., Hkv, D]` each."""
        k = self.rotary(self.k_norm(self._heads(self.k_proj, x, self.head_size)), positions)
        return k, self._heads(self.v_proj, x, self.head_size)

    def _heads(self, projection: nn.Module, x: Tensor, size: int) -> Tensor:
        """`[..., heads, size]`."""
        result: Tensor = projection(x).unflatten(-1, (-1, size))
        return result


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(sizes.width, sizes.inner, bias=sizes.has_mlp_bias) for _ in range(2))
        self.down_proj = nn.Linear(sizes.inner, sizes.width, bias=sizes.has_mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., H]`."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class DecoderLayer(nn.Module):
    """An ordinary layer: attention, then the MLP, each behind a norm and added to what it read."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = sizes.norm(), sizes.norm()
        self.self_attn, self.mlp = Attention(sizes), MLP(sizes)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`[..., H]` for tokens `x[..., H]` at `positions[...]`."""
        x = x + self.self_attn(self.input_layernorm(x), positions, attend)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result
