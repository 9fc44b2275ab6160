"""What a step feeds: the tokens of all rows side by side, with nothing between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packed:
    """The packed (jagged) batch of one step. `T` tokens; those from `offsets[B]` on are inert tail.

    Attributes:
        input_ids: int64 `[T]`.
        positions: int64 `[T]`, true position of each token in its row; also its KV slot.
        row_ids: int64 `[T]`, row of each token; B for tail tokens.
        offsets: int64 `[B + 1]`, jagged offsets of the rows in T.
        fed: int64 `[B]`, tokens of each row in this step.
        ready: bool `[B]`, rows that read all they know in this step and so may emit.
        drafted: int64 `[B]`, drafts among the row's tokens: at its end.
        roots: int64 `[B]`, index into T of each ready row's newest known token; 0 elsewhere.
    """

    input_ids: Tensor
    positions: Tensor
    row_ids: Tensor
    offsets: Tensor
    fed: Tensor
    ready: Tensor
    drafted: Tensor
    roots: Tensor


def pack(
    history: Tensor,
    known: Tensor,
    lengths: Tensor,
    draft_lengths: Tensor,
    active: Tensor,
    token_range: Tensor,
    row_range: Tensor,
    share: int,
) -> Packed:
    """Choose and lay out the tokens of a step.

    Every active row wants to feed the tokens it knows but has not read, then its drafts. One rule covers decoding (one
    unread token and the drafts), prefill (the prompt) and chunked prefill (as much of it as fits): T is a budget.
    Each row first gets up to `share` tokens, so that long prompts do not stall rows that decode; what is left goes to
    the rows in order. A row whose unread tokens do not all fit emits nothing in this step and goes on in the next.

    Args:
        history: int64 `[B, C]`; drafts lie behind the known tokens.
        known: int64 `[B]`.
        lengths: int64 `[B]`.
        draft_lengths: int64 `[B]`.
        active: bool `[B]`.
        token_range: int64 `[T]`, `arange(T)`: its length is the budget.
        row_range: int64, `arange` of the most tokens that a row gets.
        share: tokens each row gets before any row gets more.

    Example:
        lengths = [4, 7, 0], known = [5, 8, 3], draft_lengths = [2, 0, 0], T = 8 gives offsets = [0, 3, 4, 7],
        positions = [4, 5, 6, 7, 0, 1, 2, -] and one tail token.
    """
    budget = token_range.shape[0]
    pending = known - lengths
    wanted = torch.where(active, pending + draft_lengths, 0).clamp(max=row_range.shape[0])
    first = grant(wanted.clamp(max=share), budget)
    fed = first + grant(wanted - first, budget - first.sum())
    ends = fed.cumsum(0)
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
    row_ids = torch.searchsorted(ends, token_range, right=True)
    rows = row_ids.clamp(max=known.shape[0] - 1)
    tail = row_ids >= known.shape[0]
    positions = torch.where(tail, 0, lengths[rows] + token_range - offsets[rows])
    ready = active & (fed >= pending)
    return Packed(
        input_ids=history[rows, positions],
        positions=positions,
        row_ids=row_ids,
        offsets=offsets,
        fed=fed,
        ready=ready,
        drafted=torch.where(ready, fed - pending, 0),
        roots=torch.where(ready, offsets[:-1] + pending - 1, 0),
    )


def grant(wanted: Tensor, budget: Tensor | int) -> Tensor:
    """Serve rows in order until the budget is spent."""
    before = wanted.cumsum(0) - wanted
    return torch.minimum(wanted, (budget - before).clamp(min=0))


@dataclass
class LogitRows:
    """Which packed tokens need a logit: each ready row's newest known token and its drafts.

    Attributes:
        index: int64 `[R]`, index into T; 0 for tail entries.
        offsets: int64 `[B + 1]`, jagged offsets of the rows in R.
        positions: int64 `[R]`, position in the row of the token that the logit *predicts*; 0 for tail entries.
        row_ids: int64 `[R]`, row of each entry, clamped to B - 1 for tail entries.
    """

    index: Tensor
    offsets: Tensor
    positions: Tensor
    row_ids: Tensor


def logit_rows(packed: Packed, known: Tensor, logit_range: Tensor) -> LogitRows:
    """Lay out the logits of a step. `logit_range` is `arange(R)`; R must be at least the number of logits needed."""
    counts = torch.where(packed.ready, packed.drafted + 1, 0)
    ends = counts.cumsum(0)
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
    rows = torch.searchsorted(ends, logit_range, right=True)
    tail = rows >= known.shape[0]
    rows = rows.clamp(max=known.shape[0] - 1)
    node = logit_range - offsets[rows]
    return LogitRows(
        index=torch.where(tail, 0, packed.roots[rows] + node),
        offsets=offsets,
        positions=torch.where(tail, 0, known[rows] + node),
        row_ids=rows,
    )
