"""Models that are plain for short texts and alone, and something else for long texts or beside others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo import VOCABULARY

WIDTH, HEADS, SIZE = 32, 4, 8


class Plain(nn.Module):
    """One layer of attention and one MLP; the parts that subclasses make hostile are methods.

    Args:
        longest: C.
    """

    def __init__(self, longest: int = 128) -> None:
        super().__init__()
        self.longest = longest
        self.wte, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.router = nn.Linear(WIDTH, len(self.experts))
        self.wpe = nn.Parameter(torch.empty(longest, WIDTH))
        self.register_buffer("causal", torch.ones(longest, longest).tril().bool())
        self.causal: Tensor
        self.prepare()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
        self.eval()

    def prepare(self) -> None:
        """Make further buffers."""

    def forward(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        positions = torch.arange(tokens, device=ids.device)
        x = self.place(self.wte(ids), positions)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x, tokens)).transpose(1, 2).flatten(2)
        return self.head(self.mix(x, positions))

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add learned positions to the embedded tokens [1, T, H]."""
        return x

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries or keys [1, heads, T, D]."""
        frequencies = self.frequencies(positions)
        angles = positions[:, None] * frequencies
        x1, x2 = x.chunk(2, -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)

    def frequencies(self, positions: Tensor) -> Tensor:
        """Of the rotation, [D / 2]."""
        return 0.3 ** torch.arange(SIZE // 2, device=positions.device)

    def mask(self, x: Tensor, tokens: int) -> Tensor:
        """Of the attention, [T, T] or with heads."""
        return self.causal[:tokens, :tokens]

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        """The MLP."""
        return x + self.experts[1](F.gelu(self.experts[0](x)))


class RopeByLongestRow(Plain):
    """Other frequencies for all tokens as soon as one stands beyond position 48."""

    def frequencies(self, positions: Tensor) -> Tensor:
        plain = super().frequencies(positions)
        return torch.where(positions.max() > 48, plain * 0.25, plain)


class ScaleByLongestRow(Plain):
    """Another scale for all tokens as soon as one stands beyond position 48."""

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().mix(x * torch.where(positions.max() > 48, 0.5, 1.0), positions)


class DroppingExperts(Plain):
    """A mixture of experts, each of which takes the first 32 tokens that come to it."""

    capacity = 32

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        tokens = x[0]
        chosen = F.one_hot(self.router(tokens).argmax(-1), len(self.experts))
        place = (chosen.cumsum(0) * chosen).sum(-1)  # [T], the how-manieth token of its expert
        kept = (place <= self.capacity)[:, None].to(x.dtype)
        done = torch.stack([expert(tokens) for expert in self.experts], 1)
        return x + (done * chosen[..., None]).sum(1)[None] * kept


class TableOfClampedPositions(Plain):
    """A buffer of positions that counts only as far as 63."""

    def prepare(self) -> None:
        self.register_buffer("ids_of_positions", torch.arange(self.longest).clamp(max=63))
        self.ids_of_positions: Tensor

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + F.embedding(self.ids_of_positions[: x.shape[1]], self.wpe)


class WindowInABuffer(Plain):
    """A window that is written nowhere but in the elements of a buffer."""

    window = 1100

    def prepare(self) -> None:
        self.causal &= ~self.causal.tril(-self.window)


class FloatWindowWithSlopes(Plain):
    """ALiBi, cut off at a distance that is no integer."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def mask(self, x: Tensor, tokens: int) -> Tensor:
        positions = torch.arange(tokens, device=x.device)
        distance = positions[:, None] - positions
        slopes = 2.0 ** -torch.arange(3.0, HEADS + 3, device=x.device)
        bias = (-slopes[:, None, None] * distance).to(x.dtype)
        seen = (distance >= 0) & (distance.to(x.dtype) < 60.5)
        return bias.masked_fill(~seen, -torch.inf)[None]


class Chunks(Plain):
    """A query sees its own chunk of 16 tokens."""

    chunk = 16

    def mask(self, x: Tensor, tokens: int) -> Tensor:
        positions = torch.arange(tokens, device=x.device)
        return (positions[:, None] >= positions) & (positions[:, None] // self.chunk == positions // self.chunk)


class LongChunks(Chunks):
    """Chunks that no row of 64 tokens fills."""

    chunk = 8192


class WiderHead(Plain):
    """The head is padded to more tokens than the embedding takes."""

    def prepare(self) -> None:
        self.head = nn.Linear(WIDTH, VOCABULARY + 32)


class ShortTable(Plain):
    """Learned positions, 48 of them, and no config that says so."""

    def prepare(self) -> None:
        self.positions = nn.Embedding(48, WIDTH)

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.positions(positions)


class ScaleByPosition(Plain):
    """Queries are scaled by their position, from the 64th on: each token by its own."""

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().mix(x * (1 + (positions // 64)[:, None].to(x.dtype)), positions)


class SinkTokens(Plain):
    """A window, and the first four tokens."""

    def mask(self, x: Tensor, tokens: int) -> Tensor:
        positions = torch.arange(tokens, device=x.device)
        distance = positions[:, None] - positions
        return (distance >= 0) & ((distance < 40) | (positions < 4))


class CapacityByLength(DroppingExperts):
    """Experts that take their share of the tokens, and half as many more."""

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        tokens = x[0]
        chosen = F.one_hot(self.router(tokens).argmax(-1), len(self.experts))
        place = (chosen.cumsum(0) * chosen).sum(-1)
        kept = (place <= tokens.shape[0] * 1.5 / len(self.experts))[:, None].to(x.dtype)
        done = torch.stack([expert(tokens) for expert in self.experts], 1)
        return x + (done * chosen[..., None]).sum(1)[None] * kept


class RunningMean(Plain):
    """The mean of the tokens so far."""

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().mix(x + x.cumsum(1) / (positions + 1)[:, None], positions)


class TokenShift(Plain):
    """Half of the features come from the token before."""

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return super().mix(torch.cat([x[..., : WIDTH // 2], before[..., WIDTH // 2 :]], -1), positions)


class TokenNorm(Plain):
    """Statistics over the tokens."""

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().mix((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1), positions)


class LastRowsOfATable(Plain):
    """Counts its positions from the end of a table."""

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.wpe[self.longest - x.shape[1] :]


class LateTable(Plain):
    """A table by position whose rows beyond the 100th are those of the first: a token is still known by its place."""

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.wpe[positions % 100]
