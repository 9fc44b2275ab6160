"""What a policy sees, for the tests of policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emssd_compile.policies import LengthPolicy, PartSizes, PolicyContext, Ranking
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.policy import fit, outcome


def zeros(
    policy: LengthPolicy, rows: int, limit: int, num_grades: int = 1, max_depth: int | None = None
) -> dict[str, Tensor]:
    """The policy's state before anything was seen."""
    specs = policy.tensors(PartSizes(rows, 64, 32, limit, num_grades, max_depth))
    return {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}


def chains(lengths: Sequence[int], limit: int, grades: Tensor | None = None) -> Nodes:
    """Rows with so many drafts."""
    tokens = torch.zeros((len(lengths), limit), dtype=torch.int64)
    return Nodes(tokens, torch.tensor(lengths), tokens if grades is None else grades, None, limit)


def context(
    proposed: Sequence[int], limit: int, state: dict[str, Tensor], *, grades: Tensor | None = None, **changes: Any
) -> PolicyContext:
    """Rows that decode and propose so many drafts of these grades; else as `context_of`."""
    draft = chains(proposed, limit, grades)
    return context_of(draft, draft.exist, state, **changes)


def context_of(
    draft: Nodes,
    proposed: Tensor,
    state: dict[str, Tensor],
    *,
    verified: Nodes | None = None,
    accepted: Sequence[int] | None = None,
    path: Tensor | None = None,
    **changes: Any,
) -> PolicyContext:
    """Rows that decode; all sizes of a step cost alike.

    Args:
        draft: what is drafted.
        proposed: bool `[B, K]`, which of it can be verified.
        state: the policy's own.
        verified: what this step verified; None for nothing.
        accepted: how much of that was accepted.
        path: of trees, the nodes accepted.
        **changes: other values of other fields.
    """
    rows, limit = draft.tokens.shape
    if verified is None:
        verified = Nodes(draft.tokens, torch.zeros_like(draft.lengths), draft.grades, draft.parents, draft.max_depth)
    tried, kept = outcome(verified, path, torch.tensor([0] * rows if accepted is None else accepted))
    seen: dict[str, Any] = {
        "draft": draft,
        "proposed": proposed,
        "verified": verified,
        "tried": tried,
        "accepted": kept,
        "num_tokens": torch.tensor(rows),
        "num_emitting": torch.tensor(rows),
        "seconds": torch.ones(rows * (limit + 1) + 1),
        "state": state,
    }
    return PolicyContext(**{**seen, **changes})


def lengths(ranking: Ranking, seen: PolicyContext, budget: int = 1000) -> list[int]:
    """How many drafts of each row the step verifies."""
    return chosen(ranking, seen, budget).sum(1).tolist()


def chosen(ranking: Ranking, seen: PolicyContext, budget: int = 1000) -> Tensor:
    """Which drafts the step verifies, bool `[B, K]`, as `FuseStep` chooses them."""
    return fit(ranking, seen.draft, seen.proposed, torch.minimum(ranking.wanted, torch.tensor(budget)))
