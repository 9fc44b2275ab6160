"""The filters of sampling beside transformers' own, for their tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.logits import LogitsProcessor, Processed
from tests.logits.contexts import Line, context

Make = Callable[[Any], Any]
NEAR = 1e-4
"""A filter may decide otherwise than transformers where a value this much (relative) larger or smaller would, too."""


@dataclass(frozen=True)
class Row:
    """Logits of one row: finite ones all differ.

    Attributes:
        scale: how far they lie apart.
        size: V.
        allowed: how many are not -inf, at least one.
        seed: of the rest.
    """

    scale: float
    size: int
    allowed: int
    seed: int

    def logits(self, dtype: torch.dtype) -> Tensor:
        """`[V]`; in bfloat16 multiples of 1/8 before they are scaled by a power of 2, else anything."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(self.size, generator=generator)
        values = (order - self.size // 2) / 8
        if dtype == torch.float32:
            values = values + torch.rand(self.size, generator=generator) / 16
        barred = torch.randperm(self.size, generator=generator) >= self.allowed
        return (values * self.scale).to(dtype).masked_fill(barred, -torch.inf)


SIZE = 130  # more than top-h looks at
rows = st.builds(
    Row,
    scale=st.sampled_from([0.0625, 0.5, 1, 4, 32]),
    size=st.just(SIZE),
    allowed=st.one_of(st.just(1), st.integers(1, SIZE)),
    seed=st.integers(0, 2**31),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def applied(processor: LogitsProcessor, logits: Tensor, options: Mapping[str, Sequence[float]]) -> Tensor:
    """What the processor makes of `[B, V]`, an entry of two rows each, which comes out the same for both.

    Args:
        processor: with none but these options.
        logits: a row of the batch each.
        options: a value for each row.
    """
    declared = processor.options()
    assert options.keys() == declared.keys()
    seen = replace(
        context([Line([7], [], [])] * len(logits), 0, trees=False),
        logits=logits.repeat_interleave(2, 0),
        row_ids=torch.arange(len(logits)).repeat_interleave(2),
        options={name: torch.tensor(values, dtype=declared[name].dtype) for name, values in options.items()},
    )
    before = seen.logits.clone()
    answer = processor(seen)
    assert isinstance(answer, Processed)
    assert torch.equal(seen.logits.view(torch.uint8), before.view(torch.uint8)), "it reads its context only"
    found = answer.logits
    assert found.dtype == logits.dtype
    assert torch.equal(found[::2].view(torch.uint8), found[1::2].view(torch.uint8))
    return found[::2]


def kept(make: Make, value: float, logits: Tensor) -> Tensor:
    """Which of `[V]` logits a processor of transformers leaves, in float64."""
    found = make(value)(None, logits.double()[None])[0]
    return torch.isfinite(found)


def assert_filters_as(make: Make, value: float, logits: Tensor, found: Tensor, *, least: float, most: float) -> None:
    """What is kept lies between what transformers keeps with values next to this one, and what is kept is as it was."""
    below, above = (kept(make, min(max(value * factor, least), most), logits) for factor in (1 - NEAR, 1 + NEAR))
    ours = torch.isfinite(found)
    assert not (ours & ~(below | above)).any(), "more is kept"
    assert not (below & above & ~ours).any(), "less is kept"
    assert same_bits(found[ours], logits[ours])
    assert ours.any()


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Also where they are NaN or -0."""
    return torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def rubbish() -> Tensor:
    """`[7, V]`: rows that no filter is made for, such as those behind the last one of a step."""
    logits = torch.randn(7, SIZE)
    logits[0], logits[1, 3], logits[2, 5], logits[3, ::2] = -torch.inf, torch.nan, torch.inf, -torch.inf
    logits[4], logits[5] = 0.0, torch.full((SIZE,), -0.0)
    logits[6] *= 1e38
    return logits
