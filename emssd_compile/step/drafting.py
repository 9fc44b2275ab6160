"""The contract of a drafter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from emssd_compile.errors import DrafterError
from emssd_compile.step.pack import Packed
from emssd_compile.step.parts import Part
from emssd_compile.step.tensor_spec import TensorSpec


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
        state: the drafter's own tensors, as declared by `Drafter.tensors`.
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
        state: new values of the tensors in `Drafter.tensors`, but for those written in place.
        grades: int64 `[B, K]`, 0 to `num_grades - 1`: how sure the drafter is of each draft, in whatever way it knows.
            A policy learns what each grade is worth, so it need not be calibrated. None grades all alike; grades
            out of range count as the nearest.
    """

    tokens: Tensor = field(metadata={"shape": "BK"})
    lengths: Tensor = field(metadata={"shape": "B"})
    state: dict[str, Tensor] = field(default_factory=dict)
    grades: Tensor | None = field(default=None, metadata={"shape": "BK"})


class PackedModel(Protocol):
    """A causal LM compiled to run on packed rows, for drafters that hold one."""

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that a row of its KV caches can hold: C, or less where the model has fewer positions."""
        ...

    @property
    def cache_shapes(self) -> dict[str, TensorSpec]:
        """Its KV caches by name; written in place."""
        ...

    def __call__(
        self, packed: Packed, lengths: Tensor, logit_index: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[T, H]` and logits `[R, V]`; writes the KV of the packed tokens into `caches`."""
        ...


Compile = Callable[[nn.Module], PackedModel]


class Drafter(Part):
    """Proposes tokens; verification decides. A poor draft costs time, never correctness.

    Attributes:
        num_draft_tokens: K, the most tokens a row may draft; 0 for none.
        num_grades: how many grades `Draft.grades` may tell apart; at least 1.
        reads_ahead: whether the drafter reads the text with a model of its own (it needs `DraftContext.draft_range`).
    """

    num_draft_tokens: int
    num_grades: int = 1
    reads_ahead: bool = False

    def prepare(self, compile_model: Compile, rows: int, capacity: int, vocabulary: int) -> None:
        """Called once before tracing, with the target's sizes. Raises DrafterError if the drafter does not fit."""

    def forward(self, context: DraftContext) -> Draft:
        """Draft all rows at once."""
        raise NotImplementedError


def check_drafter(drafter: Drafter) -> Drafter:
    """The drafter, if its attributes make sense. Raises DrafterError saying which does not."""
    name = type(drafter).__name__
    for attribute, least in (("num_draft_tokens", 0), ("num_grades", 1)):
        value = getattr(drafter, attribute, None)
        if type(value) is not int or value < least:
            raise DrafterError(f"{name}.{attribute} = {value!r}; set it to an integer of at least {least}")
    if type(drafter.reads_ahead) is not bool:
        raise DrafterError(f"{name}.reads_ahead = {drafter.reads_ahead!r}; set it to True or False")
    return drafter
