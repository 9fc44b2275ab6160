"""What `bench.kernels` computes: the attention of one layer in one step, its inputs, its bytes and the right answer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.ops._ragged_attention import reference


@dataclass(frozen=True)
class Case:
    """A step's attention in one layer.

    Attributes:
        rows: B.
        context: committed tokens of each row.
        tokens: tokens of each row in the step, K + 1; T = rows × tokens.
        heads: Hq.
        kv_heads: Hkv.
        head_size: D.
    """

    rows: int
    context: int
    tokens: int
    heads: int
    kv_heads: int
    head_size: int

    def num_bytes(self, itemsize: int) -> int:
        """Bytes that have to be moved: K and V of context and step once, queries in, output out."""
        kv = 2 * self.rows * (self.context + self.tokens) * self.kv_heads * self.head_size
        queries = 2 * self.rows * self.tokens * self.heads * self.head_size
        return (kv + queries) * itemsize

    @property
    def reference_bytes(self) -> int:
        """Bytes of the reference's copies of keys and values."""
        return 2 * 4 * self.rows * self.tokens * (self.context + self.tokens) * self.kv_heads * self.head_size


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors of `emssd::ragged_attention` for a chain of `case.tokens` in every row, filled at random."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    capacity = case.context + case.tokens
    step = torch.arange(case.tokens, device=device)
    return (
        random(case.rows * case.tokens, case.heads, case.head_size),
        random(case.rows, capacity, case.kv_heads, case.head_size),
        random(case.rows, capacity, case.kv_heads, case.head_size),
        torch.arange(case.rows + 1, device=device) * case.tokens,
        torch.full((case.rows,), case.context, device=device),
        (case.context + step).repeat(case.rows),
    )


def expected_output(inputs: tuple[Tensor, ...], scale: float) -> Tensor:
    """The reference in float32, row by row, which bounds its memory."""
    q, k_cache, v_cache, offsets, lengths, positions = inputs
    bounds = offsets.tolist()
    rows = []
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own = slice(row, row + 1)
        rows.append(
            reference(
                q[begin:end].float(),
                k_cache[own].float(),
                v_cache[own].float(),
                torch.tensor([0, end - begin], device=q.device),
                lengths[own],
                positions[begin:end],
                scale=scale,
            )
        )
    return torch.cat(rows)
