"""Verify the drafts that make tokens come faster, and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.step.nodes import Lineage, Nodes, of_parents
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.policy import LengthPolicy, PolicyContext, Ranking
from emssd_compile.step.tensor_spec import TensorSpec

PRIOR = 0.6  # acceptance of a draft nothing is known about
ROW_PRIOR_WEIGHT, GRADE_PRIOR_WEIGHT = 4.0, 2.0  # in observations
ROW_DECAY, GRADE_DECAY = 0.8, 0.97  # per step: what is left of older observations
TIE = 0.02  # expected speeds that differ by no more than this share count as equal


class Throughput(LengthPolicy):
    """Draft lengths that maximise the expected tokens per second of the next step, from 0 to K in each row.

    A step of n drafts emits, in expectation, one token for each of its A rows and one for each draft that survives. The
    j-th draft of a row survives if it and all before it are accepted, so with conditional acceptance rates c its
    survival is s_j = c_1 ... c_j, and by linearity E[tokens] = A + (sum of s over the drafts verified). The step's time
    depends on how many tokens it feeds only: t(A + n), measured. Among all choices of n drafts, the n with the largest
    s emit most; since s does not increase along a row, these are prefixes of the rows' drafts. So the best choice is
    found by sorting all drafts by s and taking the first n. Their expected speed is

        v(n) = (A + s_(1) + ... + s_(n)) / t(A + n),

    and n* is the largest n with v(n) >= (1 - TIE) max v. v(0) is plain decoding: where verification costs more than it
    brings, as with many rows, nothing is drafted.

    Why the largest, and not the maximum of v? Around its maximum v is flat: many n are as good as the best, as exactly
    as t is known, and noise would choose among them. What v leaves out speaks for more: drafts that are tried teach
    what they are worth, and steps are saved. The price is in the definition: a step's expected speed is at most the
    share TIE below the best, and so at most that below plain decoding or verifying all.

    The rate of a draft is the geometric mean of two running averages, each with a prior: of drafts of the same grade
    and depth in all rows, and of the row itself, whose evidence fades within some steps so that a row that was
    silenced is tried again. In a tree a row's average says how often one of several siblings is accepted; a draft's
    part in that is its own average's among theirs. The constants fit prompt lookup on the demo model; they decide how
    fast rates follow, not whether the rule holds.
    """

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """Evidence of each row, and of each grade and depth.

        `row_accepted` and `row_tried` float32 `[B]`; `grade_accepted` and `grade_tried` float32 `[G, D]`, which no
        request's start resets.
        """
        of_row = TensorSpec((sizes.rows,), torch.float32)
        of_grade = TensorSpec((sizes.num_grades, sizes.depth), torch.float32, kept="forever")
        return {"row_accepted": of_row, "row_tried": of_row, "grade_accepted": of_grade, "grade_tried": of_grade}

    def forward(self, context: PolicyContext) -> Ranking:
        """Take in what the step verified, then rank `[B, K]` drafts by survival and want the n* best of them."""
        state = _learn(context)
        row = _rate(state["row_accepted"], state["row_tried"], ROW_PRIOR_WEIGHT)[:, None]  # [B, 1]
        grades = _rate(state["grade_accepted"], state["grade_tried"], GRADE_PRIOR_WEIGHT)  # [G, D]
        draft = context.draft
        grade = grades[draft.grades, _level(draft)]  # [B, K]
        if draft.parents is None:
            rate = torch.where(context.proposed, (row * grade).sqrt(), 0.0)
            survival = rate.cumprod(1)
        else:
            siblings = (draft.parents[:, :, None] == draft.parents[:, None]) & context.proposed[:, None]  # [B, K, K]
            share = grade / torch.where(siblings, grade[:, None], 0.0).sum(2)
            rate = torch.where(context.proposed, (row * share * grade).sqrt(), 0.0)
            survival = rate
            for _ in range(draft.max_depth - 1):
                survival = rate * of_parents(survival, draft.parents, root=1.0)
        # The products are in memory, in the order in which `_rank` reads them: else each comparison computes its index.
        survival = survival.flatten()  # [B * K]
        ranks = _rank(survival)
        return Ranking(ranks.view_as(draft.tokens), _best_count(survival, ranks, context), state)


def _level(draft: Nodes) -> Tensor:
    """int64 `[K]` or `[B, K]`: edges between each draft and the root, less one."""
    if draft.parents is None:
        return draft.index
    return (Lineage.of(draft.parents, draft.max_depth).depths[:, 1:] - 1).clamp(min=0)


def _rank(merit: Tensor) -> Tensor:
    """The place of each element in descending order, int64; of equal ones the first goes first.

    By comparison of all pairs: they are few, and unlike a sort this fuses with what is around it.
    """
    index = torch.arange(len(merit), device=merit.device)
    before = (merit > merit[:, None]) | ((merit == merit[:, None]) & (index < index[:, None]))  # [n, n]
    return before.sum(1)


def _rate(accepted: Tensor, tried: Tensor, prior_weight: float) -> Tensor:
    return (accepted + PRIOR * prior_weight) / (tried + prior_weight)


def _learn(context: PolicyContext) -> dict[str, Tensor]:
    """Take in what this step verified."""
    state, verified = context.state, context.verified
    tried, kept = context.tried.float(), context.accepted.float()  # [B, K]
    levels = torch.arange(verified.max_depth, device=tried.device)
    grades = torch.arange(state["grade_tried"].shape[0], device=tried.device)
    is_grade = (verified.grades == grades[:, None, None]).float()  # [G, B, K]
    if verified.parents is None:  # K is D
        row_tried = tried.sum(1)  # [B]
        grade_tried, grade_kept = (is_grade * tried).sum(1), (is_grade * kept).sum(1)  # [G, D]
    else:
        is_level = _level(verified)[:, :, None] == levels  # [B, K, D]
        row_tried = (is_level & context.tried[:, :, None]).any(1).sum(1).float()
        there = is_level.float().flatten(0, 1)  # [B * K, D]
        grade_tried, grade_kept = ((is_grade * one).flatten(1) @ there for one in (tried, kept))
    return {
        "row_accepted": ROW_DECAY * state["row_accepted"] + kept.sum(1),
        "row_tried": ROW_DECAY * state["row_tried"] + row_tried,
        "grade_accepted": GRADE_DECAY * state["grade_accepted"] + grade_kept,
        "grade_tried": GRADE_DECAY * state["grade_tried"] + grade_tried,
    }


def _best_count(survival: Tensor, ranks: Tensor, context: PolicyContext) -> Tensor:
    """The n* of the class's docstring, int64 `[]`, for the survivals of all drafts and their ranks."""
    count = torch.arange(len(survival) + 1, device=survival.device)
    ordered = survival.new_zeros(len(count)).scatter(0, ranks + 1, survival)
    speed = (context.num_emitting + ordered.cumsum(0)) / _time(context.seconds, context.num_tokens + count)
    speed = torch.where(count <= context.proposed.sum(), speed, 0.0)
    return torch.where(speed >= (1 - TIE) * speed.max(), count, 0).max()


def _time(seconds: Tensor, tokens: Tensor) -> Tensor:
    """Times of steps of so many tokens; past the end of the table they grow as in its second half, or not at all."""
    last = seconds.shape[0] - 1
    middle = last // 2
    slope = ((seconds[last] - seconds[middle]) / max(last - middle, 1)).clamp(min=0)
    return seconds[tokens.clamp(max=last)] + slope * (tokens - last).clamp(min=0)
