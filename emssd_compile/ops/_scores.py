"""What every form of attention shares: its attributes, and the way from raw scores to attention weights."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SCHEMA = "float scale, int window=0, int chunk=0, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None"
"""`AttentionAttributes` as keyword arguments of an op."""


@dataclass(frozen=True)
class AttentionAttributes:
    """What models do differently between queries, keys and values; `SCHEMA` has the same fields in the same order.

    A new attribute is a field here and in `SCHEMA`, a line in one of the methods, and what it takes in each kernel.

    Attributes:
        scale: multiplies the dot products.
        window: if positive, a key is seen only if ``query position - window < key position`` (sliding window, in
            tokens).
        chunk: if positive, a key is seen only from the start of the query's chunk on, ``query position // chunk *
            chunk <= key position`` (chunked attention, in tokens).
        softcap: if positive, scaled scores become ``softcap * tanh(score / softcap)`` (Gemma 2, section 2).
        alibi_slopes: ``[Hq]``, adds ``slope * (key position - query position)`` after the softcap (ALiBi, Press et al.
            2022, section 3), or None.
        sinks: ``[Hq]``, scores of a key of each head that every query sees and that has no value: ``exp(sink)`` joins
            the sum that weights are divided by, and nothing else (attention sinks, gpt-oss model card, section 2.2),
            or None.
    """

    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    def reaches(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Bool: whether window and chunk let a query see a key, of positions that broadcast against each other."""
        near = key_positions > query_positions - self.window if self.window > 0 else None
        if self.chunk <= 0:
            return torch.ones_like(key_positions >= query_positions) if near is None else near
        together = key_positions >= query_positions // self.chunk * self.chunk
        return together if near is None else near & together

    def weights(self, scores: Tensor, distance: Tensor, visible: Tensor) -> Tensor:
        """Softmax over the visible keys and the sink; a query that sees no key gets zeros.

        Args:
            scores: ``[..., Hq, Tq, S]``, the dot product of each query with each key, float32 or float64.
            distance: ``[Tq, S]``, key position minus query position, in tokens.
            visible: bool ``[Tq, S]``, whether the query sees the key, `reaches` included.

        Returns:
            Weights of the shape and dtype of ``scores``; exactly 0 where not visible.
        """
        scores = scores * self.scale
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.alibi_slopes is not None:
            scores = scores + self.alibi_slopes.to(scores.dtype)[:, None, None] * distance
        weights = softmax_with_sinks(scores.masked_fill(~visible, -torch.inf), self.sinks)
        # A query without any visible key comes out of softmax as NaN; this makes it zeros.
        return weights.masked_fill(~visible, 0.0)


def in_use(attributes: Mapping[str, object]) -> set[str]:
    """Which fields of `AttentionAttributes` make a difference as they are given; `scale` always does.

    So a form of attention can say what it knows, and is not chosen for what comes later.

    Args:
        attributes: keyword arguments of an attention; a graph's nodes may stand for tensors, and others are left out.
    """
    given = {field.name: attributes.get(field.name, field.default) for field in fields(AttentionAttributes)}
    return {name for name, value in given.items() if name == "scale" or _matters(value)}


def reach(attributes: Mapping[str, object]) -> int | None:
    """How many tokens a query may see, itself included, by window and chunk; None for all.

    Args:
        attributes: as for `in_use`.
    """
    limits = [size for size in map(attributes.get, ("window", "chunk")) if isinstance(size, int) and size > 0]
    return min(limits, default=None)


def _matters(value: object) -> bool:
    return value > 0 if isinstance(value, (int, float)) else value is not None


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of ``scores[..., Hq, Tq, S]`` over S and, where there are ``sinks[Hq]``, over the sink of the head."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.to(scores.dtype)[:, None, None].expand_as(scores[..., :1])
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)
