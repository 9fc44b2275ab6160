"""The contract of a drafter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from emssd_compile.step.pack import Packed


@dataclass
class DraftContext:
    """What a drafter sees, after the step's tokens are committed.

    Attributes:
        history: int64 `[B, C]`, prompt and generated tokens of each row; only the first `known[b]` mean something.
        known: int64 `[B]`; the root token, whose continuation is to be drafted, is `history[b, known[b] - 1]`.
        hidden: float `[B, H]`, the target's last hidden state where it predicted the root token.
        active: bool `[B]`, rows being decoded.
        can_draft: bool `[B]`, rows whose drafts will be verified in the next step.
        max_drafts: int64 `[B]`, 0 to K: more would run past the row's limit.
        draft_range: int64 `[S]`, `arange(S)`: budget of packed tokens for a drafter that reads the text with a model
            of its own.
        row_range: int64, `arange` of the most of these that one row may take.
        state: the drafter's own tensors, as declared by `Drafter.state_spec` and `Drafter.cache_spec`.
    """

    history: Tensor
    known: Tensor
    hidden: Tensor
    active: Tensor
    can_draft: Tensor
    max_drafts: Tensor
    draft_range: Tensor
    row_range: Tensor
    state: dict[str, Tensor]


@dataclass
class Draft:
    """What a drafter answers.

    Attributes:
        tokens: int64 `[B, K]`; ids outside the vocabulary end the row's draft.
        lengths: int64 `[B]`, how many of them to verify; what exceeds `max_drafts` is cut.
        state: new values of the tensors in `state_spec`.
        grades: int64 `[B, K]`, 0 to `num_grades - 1`: how sure the drafter is of each draft, in whatever way it knows.
            A policy learns what each grade is worth, so it need not be calibrated. None grades all alike; grades
            out of range count as the nearest.
    """

    tokens: Tensor
    lengths: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    grades: Tensor | None = None


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and meaning of a tensor that the runtime allocates (zeros).

    Attributes:
        shape: sizes; the first is B, the rows.
        dtype: element type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class PackedModel(Protocol):
    """A causal LM compiled to run on packed rows, for drafters that hold one."""

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    @property
    def cache_shapes(self) -> dict[str, TensorSpec]:
        """Its KV caches by name."""
        ...

    def __call__(
        self, packed: Packed, lengths: Tensor, logit_index: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[T, H]` and logits `[R, V]`; writes the KV of the packed tokens into `caches`."""
        ...


Compile = Callable[[nn.Module], PackedModel]


class Drafter(nn.Module):
    """Proposes tokens; verification decides. A poor draft costs time, never correctness.

    `forward` is traced into the step graph: tensor operations only, no host read, no shape that depends on data.

    Attributes:
        num_draft_tokens: K, the most tokens a row may draft.
        num_grades: how many grades `Draft.grades` may tell apart.
        reads_ahead: whether the drafter reads the text with a model of its own (it needs `DraftContext.draft_range`).
    """

    num_draft_tokens: int
    num_grades: int = 1
    reads_ahead: bool = False

    def prepare(self, compile_model: Compile, rows: int, capacity: int, vocabulary: int) -> None:
        """Called once before tracing, with the target's sizes. Raises DrafterError if the drafter does not fit."""

    def state_spec(self) -> dict[str, TensorSpec]:
        """Tensors that `forward` returns anew; a row's entries are zeroed when a request starts in it."""
        return {}

    def cache_spec(self) -> dict[str, TensorSpec]:
        """Tensors that `forward` writes in place; never reset."""
        return {}

    def forward(self, context: DraftContext) -> Draft:
        """Draft all rows at once."""
        raise NotImplementedError
