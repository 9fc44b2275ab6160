"""The contract of a draft-length policy: how many of the proposed drafts are worth verifying."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from emssd_compile.step.fields import holds_tensors
from emssd_compile.step.nodes import Lineage, Nodes, of_parents
from emssd_compile.step.pack import grant
from emssd_compile.step.parts import Part


@holds_tensors
@dataclass
class PolicyContext:
    """What a policy sees at the end of a step.

    Attributes:
        draft: what the drafter proposes. Where the rule divides by what drafts were drawn from, their tokens and grades
            are blanks: drafts that were chosen by what they are would not be drawn from that.
        proposed: bool `[B, K]`, which of these drafts may be verified: none of rows that cannot draft. The parent of
            one that may be is one, too.
        verified: the drafts that this step verified.
        tried: bool `[B, K]`, which of these followed an accepted node, so that their acceptance says something.
        accepted: bool `[B, K]`, which of these were accepted.
        num_tokens: int64 `[]`, tokens that the next step feeds besides drafts.
        num_emitting: int64 `[]`, rows that the next step feeds.
        seconds: float32 `[M + 1]`: element n is what a step of n packed tokens takes; it is measured while decoding.
        options: the options that the policy declares, `[B]` each, by name.
        state: the policy's own tensors, as declared by `LengthPolicy.tensors`.
    """

    draft: Nodes
    proposed: Tensor
    verified: Nodes
    tried: Tensor
    accepted: Tensor
    num_tokens: Tensor
    num_emitting: Tensor
    seconds: Tensor
    options: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


@holds_tensors
@dataclass
class Ranking:
    """What a policy answers.

    Attributes:
        ranks: int64 `[B, K]`, the order in which proposed drafts are given room: 0 comes first, no place is taken
            twice or left out. None comes before its parent: a draft is of use only if what it follows is verified.
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


def outcome(verified: Nodes, path: Tensor | None, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """What became of the drafts of a step: `PolicyContext.tried` and `PolicyContext.accepted`.

    Args:
        verified: the drafts.
        path: int64 `[B, D + 1]`, the accepted nodes of trees; None for chains.
        accepted: int64 `[B]`, how many were accepted.
    """
    index = verified.index
    if path is None or verified.parents is None:
        return verified.exist & (index <= accepted[:, None]), verified.exist & (index < accepted[:, None])
    depth = torch.arange(verified.max_depth, device=index.device)
    is_accepted = (path[:, 1:, None] == index + 1) & (depth < accepted[:, None])[:, :, None]  # [B, D, K]
    on_path = is_accepted.any(1) & verified.exist
    return of_parents(on_path, verified.parents, root=True) & verified.exist, on_path


def fit(ranking: Ranking, draft: Nodes, proposed: Tensor, room: Tensor, *, in_order: bool = False) -> Tensor:
    """Bool `[B, K]`: the best `room` (int64 `[]`) of the drafts that are `proposed` (bool `[B, K]`).

    Never more than `room` together, and never one without its parent, also where `ranks` is not the order that it
    should be: rows are then served in theirs. With `in_order`, never one without the siblings before it.
    """
    has_room = proposed & (ranking.ranks < room)  # [B, K]
    if draft.parents is None:
        return draft.index < grant(has_room.sum(1), room)[:, None]
    if in_order:
        siblings = draft.parents[:, :, None] == draft.parents[:, None]  # [B, K, K]
        earlier = siblings & (draft.index < draft.index[:, None])
        has_room = has_room & ~(earlier & ~has_room[:, None]).any(2)
    kept = Lineage.of(draft.parents, draft.max_depth).closed(has_room)
    granted = grant(kept.sum(1), room)  # [B]
    return kept & (kept.cumsum(1) <= granted[:, None])


def proposed_drafts(draft: Nodes, is_token: Tensor, max_drafts: Tensor) -> Tensor:
    """Which of a drafter's drafts can be verified, bool `[B, K]`: with all that they follow.

    Args:
        draft: what the drafter proposes.
        is_token: bool `[B, K]`, whether a draft is a token at all.
        max_drafts: int64 `[B]`, most drafts on a path.
    """
    usable = is_token & draft.exist
    if draft.parents is None:
        return draft.index < torch.minimum(usable.to(torch.int64).cumprod(1).sum(1), max_drafts)[:, None]
    lineage = Lineage.of(draft.parents, draft.max_depth + 1)  # one more: to see which are too deep
    return lineage.closed(usable & (lineage.depths[:, 1:] <= max_drafts[:, None]))
