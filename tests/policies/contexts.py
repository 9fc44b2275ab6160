"""What a policy sees, for the tests of policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emssd_compile.policies import LengthPolicy, PartSizes, PolicyContext, Ranking
from emssd_compile.step.policy import fit


def zeros(policy: LengthPolicy, rows: int, limit: int, num_grades: int = 1) -> dict[str, Tensor]:
    """The policy's state before anything was seen."""
    specs = policy.tensors(PartSizes(rows, 64, 32, limit, num_grades))
    return {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}


def context(proposed: Sequence[int], limit: int, state: dict[str, Tensor], **changes: Any) -> PolicyContext:
    """Rows that decode and propose so many drafts, after a step without any; all sizes of a step cost alike."""
    rows = len(proposed)
    none = torch.zeros(rows, dtype=torch.int64)
    seen: dict[str, Any] = {
        "proposed": torch.tensor(proposed),
        "grades": torch.zeros((rows, limit), dtype=torch.int64),
        "drafted": none,
        "accepted": none,
        "num_tokens": torch.tensor(rows),
        "num_emitting": torch.tensor(rows),
        "seconds": torch.ones(rows * (limit + 1) + 1),
        "state": state,
    }
    return PolicyContext(**{**seen, **changes})


def lengths(ranking: Ranking, seen: PolicyContext, budget: int = 1000) -> list[int]:
    """What the step makes of a ranking, as `FuseDraft` does."""
    return fit(ranking, seen.proposed, torch.minimum(ranking.wanted, torch.tensor(budget))).tolist()
