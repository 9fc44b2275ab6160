"""What the tokens of a draft head attend to: caches of their own in a step, and one another in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emssd_compile.ops import append_kv, ragged_attention
from emssd_compile.step.pack import Packed


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, `[B, slots, Hkv, D]` each; written in place."""

    keys: Tensor
    values: Tensor

    def append(self, k: Tensor, v: Tensor, packed: Packed) -> None:
        """Write keys and values `[T, Hkv, D]` of the packed tokens into their slots."""
        slots = packed.positions if packed.slots is None else packed.slots  # [T]
        append_kv(self.keys, self.values, k, v, packed.row_ids, slots)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, lengths: Tensor, *, window: int = 0) -> Tensor:
        """`[T, Hq, D]`: append the packed tokens behind the `lengths[B]` that count, and attend to what each sees.

        With a `window`, that is what lies less than so many positions before it.
        """
        self.append(k, v, packed)
        result: Tensor = ragged_attention(
            q,
            self.keys,
            self.values,
            packed.offsets,
            lengths,
            packed.positions,
            scale=q.shape[-1] ** -0.5,
            window=window,
            ancestors=packed.ancestors,
        )
        return result


@dataclass
class NodeAttention:
    """One layer's attention for nodes that are drafted: equally many of each row that goes on, one depth at a time.

    What a step of attention reads lies in one piece behind the tokens that count. So where nodes are kept for those
    below them, as in trees, they are attended with again, and written again as they are; nothing else of them is
    computed anew.

    Attributes:
        cache: of the layer.
        packed: all nodes so far; `input_ids` says which of `[B * n]` each is.
        order: int64 `[B, n]`, the place in T of each node.
        lengths: int64 `[B]`, slots of each row that all nodes see.
        before: queries, keys and values of the nodes before these, `[B, nodes, heads, D]` each; empty without any.
    """

    cache: Cache
    packed: Packed
    order: Tensor
    lengths: Tensor
    before: tuple[Tensor, ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, new nodes, Hq, D]`, for q, k and v `[B, new nodes, heads, D]`; they then are among those `before`."""
        new = (q, k, v)
        pairs = zip(self.before, new, strict=True)
        self.before = tuple(torch.cat(pair, 1) for pair in pairs) if self.before else new
        placed = [x.flatten(0, 1)[self.packed.input_ids] for x in self.before]  # [T, heads, D]
        result: Tensor = self.cache.attend(placed[0], placed[1], placed[2], self.packed, self.lengths)
        newest = self.order[:, -q.shape[1] :]  # [B, new nodes]
        return result[newest]


class SelfFedAttention:
    """One layer's attention while a head is trained to feed on its own features (EAGLE-3's training-time test).

    The k-th call is for the k-th draft behind each of S roots at once. That of root t sees the first call's keys up to
    t, which were made of the target's features, and from each later call the one of its own root: as when it drafts.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, S, Hq, D]` for q of that shape, and k and v `[B, S, Hkv, D]`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, S, D]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # [B, Hq, S, D]
        self.keys.append(k)
        self.values.append(v)
        if len(self.keys) == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        length = q.shape[2]
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)  # [S, S]
        scores = (q @ self.keys[0].mT).masked_fill(later, -torch.inf)  # [B, Hq, S, S]
        own = [(q * key).sum(-1, keepdim=True) for key in self.keys[1:]]  # [B, Hq, S, 1] each
        weights = (torch.cat([scores, *own], -1).float() * q.shape[-1] ** -0.5).softmax(-1).to(q.dtype)
        of_target, *of_own = weights.split([length, *(1 for _ in own)], -1)
        result: Tensor = of_target @ self.values[0]
        for weight, value in zip(of_own, self.values[1:], strict=True):
            result = result + weight * value
        return result.transpose(1, 2)


@dataclass(frozen=True)
class BlockAttention:
    """One layer's attention while a head is trained to draft blocks, behind A places of each text at once.

    Attributes:
        keys, values: of the texts, `[B, S, Hkv, D]`.
        places: int64 `[A]`, the last token that each block sees of its text.
        window: how many positions back a token sees; 0 for all.
        is_causal: whether a token sees only those before it of its block.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    window: int
    is_causal: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, A, n, Hq, D]` for the n tokens of each block: q of that shape, k and v `[B, A, n, Hkv, D]`."""
        group, count = q.shape[3] // k.shape[3], q.shape[2]
        keys, values, k, v = (x.repeat_interleave(group, -2) for x in (self.keys, self.values, k, v))
        slots, index = (torch.arange(size, device=q.device) for size in (keys.shape[1], count))
        hidden = (slots > self.places[:, None])[:, None]  # [A, 1, S]
        if self.window:
            own = self.places[:, None] + 1 + index  # [A, n], positions
            hidden = hidden | (slots <= own[:, :, None] - self.window)  # [A, n, S]
        of_text = torch.einsum("banhd,bshd->bhans", q, keys).masked_fill(hidden, -torch.inf)
        of_block = torch.einsum("banhd,bamhd->bhanm", q, k)
        if self.is_causal:
            of_block = of_block.masked_fill(index > index[:, None], -torch.inf)
        scores = torch.cat([of_text, of_block], -1).float() * q.shape[-1] ** -0.5
        on_text, on_block = scores.softmax(-1).to(q.dtype).split([len(slots), count], -1)
        result: Tensor = torch.einsum("bhans,bshd->banhd", on_text, values)
        return result + torch.einsum("bhanm,bamhd->banhd", on_block, v)
