"""Multi-candidate speculative decoding: MCSD (2401.06706) and Improving MCSD (2409.10644)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from emssd_compile.drafters.draft_model import DraftModel, load_causal_lm
from emssd_compile.drafters.tree_shape import MOST_NODES, TreeShape
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, number, shown
from emssd_compile.step.proposals import DETERMINISTIC


class MultiCandidate(DraftModel):
    """Several candidates for each token, from a draft model: the tree of MCSD (2401.06706), by its names.

    Without a threshold the drafts are those of `DraftModel(model, tree=k)`, and so is the step, node for node. What
    MCSD adds is a rule: with `acceptance="rrs"` candidates are drawn from q without replacement and tested in the order
    drawn, which keeps the target's distribution. With `"match"`, the default, they are the tokens with the largest log
    q + noise, and a seed gives the text of decoding without drafts.

    With a threshold each row drafts only as deep as some branch is likely enough (2409.10644, Improving MCSD). A branch
    is as likely as the draft model says: the product of the probabilities of its tokens. The paper trains a model for
    that and stops at 0.5. Only `match` and other rules that need no q go with it: drafts that are chosen by what they
    are do not follow q. Fewer tokens are verified then; the draft model is run as often.

    Args:
        model: a causal LM over the target's vocabulary.
        k: candidates behind the root, behind each of those, and so on (the paper's k-configuration); or one number for
            all depths.
        depth: D, how deep the tree is, where `k` is a number.
        threshold: 0 to 1. A depth is drafted if one of its branches is likelier than that; None drafts them all.

    Raises:
        OptionError: an option is out of range, or `depth` is given where `k` says it or left out where it does not.

    Example:
        `MultiCandidate(model, (4, 2, 2))` drafts K = 4 + 8 + 16 tokens; `MultiCandidate(model, 2, depth=3)` is
        `MultiCandidate(model, (2, 2, 2))`: K = 2 + 4 + 8. If the tokens of the likeliest branch have probabilities 0.9,
        0.6 and 0.8, threshold 0.5 drafts to depth 2: 0.9 * 0.6 > 0.5 > 0.9 * 0.6 * 0.8.
    """

    def __init__(
        self,
        model: nn.Module,
        k: int | Sequence[int] = (4, 2, 2),
        *,
        depth: int | None = None,
        threshold: float | None = None,
    ) -> None:
        super().__init__(model, tree=_candidates(k, depth))
        self.threshold = None if threshold is None else _probability(f"{type(self).__name__} threshold", threshold)
        if threshold is not None:
            self.proposes = (DETERMINISTIC,)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the tree is said by other options
        cls,
        path: str,
        k: int | Sequence[int] = (4, 2, 2),
        *,
        depth: int | None = None,
        threshold: float | None = None,
        **options: Any,
    ) -> Self:
        """Load a Hugging Face causal LM (`options` go to its `from_pretrained`) and draft with it."""
        return cls(load_causal_lm(path, **options), k, depth=depth, threshold=threshold)

    def _worth_drafting(self, levels: Sequence[Tensor], max_drafts: Tensor) -> Tensor:
        """Not as deep as the newest level, of rows of which no branch is likely enough, `[B]`."""
        if self.threshold is None:
            return max_drafts
        likely = levels[0]  # [B, branches]
        for level in levels[1:]:
            likely = (likely[:, :, None] * level.unflatten(1, (likely.shape[1], -1))).flatten(1)
        is_worth_it = likely.amax(1) > self.threshold
        return torch.where(is_worth_it, max_drafts, max_drafts.clamp(max=len(levels) - 1))


def _candidates(k: object, depth: object) -> tuple[int, ...]:
    """How many candidates there are at each depth. Raises OptionError."""
    if isinstance(k, Iterable):
        if depth is not None:
            raise OptionError(
                f"MultiCandidate depth={shown(depth)} is for one k at all depths, and k={shown(k)} says how deep the "
                "tree is; leave depth out"
            )
        return TreeShape.of("MultiCandidate k", k).branching
    number = integer("MultiCandidate k", k, least=1)
    if depth is None:
        raise OptionError(f"MultiCandidate k={number} is one number for all depths; pass depth, or k={(number,) * 3}")
    deep = integer("MultiCandidate depth", depth, least=1, most=MOST_NODES)
    return TreeShape.of("MultiCandidate k", (number,) * deep).branching


def _probability(option: str, value: object) -> float:
    """`value` as a float from 0 to 1. Raises OptionError naming the option if it is none."""
    probability = float(number(option, value))
    if not 0 <= probability <= 1:
        raise OptionError(f"{option}={probability} is out of range; pass 0 to 1")
    return probability
