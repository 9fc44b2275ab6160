"""Trees that begin with the target's own candidates (Improving MCSD, 2409.10644)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from emssd_compile.drafters.draft_model import load_causal_lm
from emssd_compile.drafters.multi_candidate import MultiCandidate
from emssd_compile.drafters.tree_shape import MOST_NODES
from emssd_compile.numeric import integer
from emssd_compile.step.drafting import DraftContext


class TargetInitialized(MultiCandidate):
    """Branches that begin with what the target thought likely itself, each continued by a draft model (2409.10644).

    The target's distribution that chose the root token is known, and the next one is not. The paper drafts behind the w
    likeliest tokens of the known one and emits whichever has the longest branch behind it. That is lossy, also where
    nobody samples: here the target's choice is emitted, always. What it did not choose cannot stand in that place any
    more. Now and then it comes next instead, so the w likeliest of the others are drafted behind the root; of rows that
    sample, those with the largest log p + noise.

    The draft model continues each by its likeliest token, one depth after another, and says how likely the branch is;
    rows stop where none is likelier than `threshold` (see `MultiCandidate`, also for rules that go with it). This is to
    be compared with, not to be fast: a draft model's own candidates are right much more often (docs/drafters.md).

    Args:
        model: a causal LM over the target's vocabulary.
        width: w, branches.
        depth: D, tokens of a branch.
        threshold: 0 to 1. A depth is drafted if one of its branches is likelier than that.

    Raises:
        OptionError: an option is out of range.
    """

    reads_logits = True

    def __init__(self, model: nn.Module, width: int = 4, depth: int = 4, *, threshold: float = 0.5) -> None:
        width = integer("TargetInitialized width", width, least=1, most=MOST_NODES)
        depth = integer("TargetInitialized depth", depth, least=1, most=MOST_NODES // width)
        super().__init__(model, (width, *(1,) * (depth - 1)), threshold=threshold)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the tree is said by other options
        cls, path: str, width: int = 4, depth: int = 4, *, threshold: float = 0.5, **options: Any
    ) -> Self:
        """Load a Hugging Face causal LM (`options` go to its `from_pretrained`) and draft with it."""
        return cls(load_causal_lm(path, **options), width, depth, threshold=threshold)

    def _choose(self, logits: Tensor, count: int, depth: int, first_draft: int, context: DraftContext) -> Tensor:
        """Behind the root the target's candidates for the root's own place, `[B, w]`; behind others the model's."""
        if depth == 0:
            assert context.logits is not None, "it says that it reads them"
            logits = context.logits.float()[:, : logits.shape[1]]  # [B, V], of the ids that the draft model has, too
            ids = torch.arange(logits.shape[1], device=logits.device)
            root = context.history.gather(1, (context.known - 1).clamp(min=0)[:, None])  # [B, 1]
            logits = torch.where(ids == root, -torch.inf, logits)
        return super()._choose(logits, count, depth, first_draft, context)
