"""The contract of a draft-length policy: how many of the proposed drafts are worth verifying."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from emssd_compile.step.pack import grant
from emssd_compile.step.parts import Part


@dataclass
class PolicyContext:
    """What a policy sees at the end of a step.

    Attributes:
        proposed: int64 `[B]`, drafts that the drafter proposes for each row; 0 for rows that cannot draft.
        grades: int64 `[B, K]`, the drafter's grade of each draft (see `Draft.grades`).
        drafted: int64 `[B]`, drafts of each row that this step verified.
        accepted: int64 `[B]`, how many of them were accepted.
        num_tokens: int64 `[]`, tokens that the next step feeds besides drafts.
        num_emitting: int64 `[]`, rows that the next step feeds.
        seconds: float32 `[M + 1]`: element n is what a step of n packed tokens takes; it is measured while decoding.
        state: the policy's own tensors, as declared by `LengthPolicy.tensors`.
    """

    proposed: Tensor
    grades: Tensor
    drafted: Tensor
    accepted: Tensor
    num_tokens: Tensor
    num_emitting: Tensor
    seconds: Tensor
    state: dict[str, Tensor]


@dataclass
class Ranking:
    """What a policy answers.

    Attributes:
        ranks: int64 `[B, K]`, the order in which proposed drafts are given room: 0 comes first, no place is taken
            twice or left out. A row's drafts keep their order: a draft is of use only if those before it are verified.
        wanted: int64 `[]`, how many drafts of all rows together are worth verifying; 0 to B * K.
        state: new values of the tensors in `LengthPolicy.tensors`, but for those written in place.
    """

    ranks: Tensor = field(metadata={"shape": "BK"})
    wanted: Tensor = field(metadata={"shape": ""})
    state: dict[str, Tensor] = field(default_factory=dict)


class LengthPolicy(Part):
    """Chooses how many drafts each row verifies: it costs or saves time, and never changes a token."""

    def forward(self, context: PolicyContext) -> Ranking:
        """Rank the drafts of all rows at once."""
        raise NotImplementedError


def fit(ranking: Ranking, proposed: Tensor, room: Tensor) -> Tensor:
    """Lengths int64 `[B]` when the best `room` (int64 `[]`) of the `proposed` (int64 `[B]`) drafts are verified.

    Never more than `room` together, also where `ranks` is not the order that it should be: rows are then served in
    theirs.
    """
    index = torch.arange(ranking.ranks.shape[1], device=proposed.device)  # [K]
    has_room = (index < proposed[:, None]) & (ranking.ranks < room)  # [B, K]
    return grant(has_room.sum(1), room)
