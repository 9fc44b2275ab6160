"""What a step keeps: emitted tokens enter the history, lengths advance, rows end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emssd_compile.step.acceptance import Verdict
from emssd_compile.step.fields import holds_tensors
from emssd_compile.step.pack import Packed
from emssd_compile.step.state import COUNTERS, StepState

REPORT_FIELDS = ("counts", "active", "pending", "draft_lengths", "wanted", "plain_counts")
"""Leading columns of a step's report; the emitted tokens follow.

`wanted` is the same in each line: how many drafts of all rows together the next step should verify, if there is room.
`plain_counts` is what would be left of `counts` without the drafts of the drafter's `costly_grades`.
"""


@holds_tensors
@dataclass
class Emission:
    """What a step emits.

    Attributes:
        tokens: int64 `[B, D + 1]`, tokens emitted by each row; the first `counts[b]` mean something.
        counts: int64 `[B]`.
        accepted: int64 `[B]`, accepted drafts that are among them.
    """

    tokens: Tensor
    counts: Tensor
    accepted: Tensor


def commit(state: StepState, packed: Packed, verdict: Verdict) -> tuple[StepState, Emission]:
    """Apply a verdict to the state.

    A ready row emits its accepted drafts and then `next_tokens`, cut behind the first EOS and at the row's limit.
    Rejected tokens are rolled back by not advancing `lengths` over them.

    Args:
        state: the state the step began with.
        packed: what the step fed.
        verdict: a feasible one.
    """
    draft, accept_lengths, next_tokens = state.draft, verdict.accept_lengths, verdict.next_tokens
    depth = torch.arange(draft.max_depth + 1, device=state.known.device)  # [D + 1]
    on_path = draft.tokens
    if verdict.path is not None:
        on_path = on_path.gather(1, (verdict.path[:, 1:] - 1).clamp(0, on_path.shape[1] - 1))  # [B, D]
    tokens = torch.cat([on_path, next_tokens[:, None]], 1)  # [B, D + 1]
    tokens = torch.where(depth < accept_lengths[:, None], tokens, next_tokens[:, None])
    ends = state.is_eos[tokens] & (depth <= accept_lengths[:, None])
    first_end = torch.where(ends, depth, draft.max_depth + 1).amin(1)  # [B]
    counts = torch.minimum(torch.minimum(accept_lengths, first_end) + 1, state.limits - state.known)
    counts = torch.where(packed.ready, counts, 0)
    known = state.known + counts
    finished = packed.ready & ((first_end < counts) | (known >= state.limits))
    accepted = torch.minimum(accept_lengths, counts)
    new = replace(
        state,
        history=write(state.history, state.known, tokens, counts),
        known=known,
        lengths=torch.where(packed.ready, known - 1, state.lengths + packed.fed),
        active=state.active & ~finished,
        counters=state.counters + _counts(state, packed, accepted, counts),
        histogram=_count_acceptance(state.histogram, packed, accepted),
    )
    return new, Emission(tokens, counts, accepted)


def newly_read(before: StepState, after: StepState, packed: Packed, path: Tensor | None) -> tuple[Packed, Tensor]:
    """The tokens whose KV a step has committed, packed, and where each of them lay among the tokens of the step, `[T]`.

    Args:
        before, after: the state that the step began with, and the one that it leaves.
        packed: what it fed.
        path: int64 `[B, D + 1]`, the nodes accepted, of trees.
    """
    counts = after.lengths - before.lengths  # [B]
    ends = counts.cumsum(0)
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
    place = torch.arange(packed.row_ids.shape[0], device=counts.device)  # [T]
    row_ids = torch.searchsorted(ends, place, right=True)
    rows, tail = row_ids.clamp(max=counts.shape[0] - 1), row_ids >= counts.shape[0]
    index = torch.where(tail, 0, place - offsets[rows])  # [T], which of its row's tokens each is
    root = (before.known - before.lengths - 1)[rows]  # [T], the index of the row's root
    node = index if path is None else root + path[rows, (index - root).clamp(0, path.shape[1] - 1)]
    source = torch.where(tail, 0, packed.offsets[rows] + torch.where(index > root, node, index))  # [T]
    read = Packed(
        input_ids=packed.input_ids[source],
        positions=torch.where(tail, 0, before.lengths[rows] + index),
        row_ids=row_ids,
        offsets=offsets,
        fed=counts,
        ready=packed.ready,
        drafted=torch.zeros_like(counts),
        roots=torch.where(packed.ready, ends - 1, 0),
    )
    return read, source


def write(history: Tensor, start: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """`history[B, C]` with `tokens[b, :counts[b]]` put at `start[b]`."""
    place = torch.arange(history.shape[1], device=history.device) - start[:, None]
    inside = (place >= 0) & (place < counts[:, None])
    return torch.where(inside, tokens.gather(1, place.clamp(0, tokens.shape[1] - 1)), history)


def _counts(state: StepState, packed: Packed, accepted: Tensor, emitted: Tensor) -> Tensor:
    decoding = packed.ready & (state.known - state.lengths == 1)
    fed = packed.fed.sum()
    values = {
        "num_steps": torch.ones_like(fed),
        "num_row_steps": decoding.sum(),
        "num_spec_steps": (packed.drafted > 0).sum(),
        "num_draft_tokens": packed.drafted.sum(),
        "num_accepted_draft_tokens": torch.where(packed.ready, accepted, 0).sum(),
        "num_emitted_tokens": emitted.sum(),
        "num_fed_tokens": fed,
        "num_padding_tokens": packed.row_ids.shape[0] - fed,
    }
    return torch.stack([values[name] for name in COUNTERS])


def _count_acceptance(histogram: Tensor, packed: Packed, accepted: Tensor) -> Tensor:
    bins = torch.arange(histogram.shape[0], device=histogram.device)
    hits = (accepted[:, None] == bins) & (packed.drafted > 0)[:, None]
    return histogram + hits.sum(0)


def plain_counts(counts: Tensor, grades: Tensor, accepted: Tensor, costly_grades: tuple[range, ...]) -> Tensor:
    """Int64 `[B]`: what would be left of the emitted tokens without the drafts of some grades.

    Args:
        counts: int64 `[B]`, emitted tokens.
        grades: int64 `[B, K]`, of the drafts that were verified.
        accepted: bool `[B, K]`, which of them were.
        costly_grades: the grades of those that would not be there; no two ranges overlap.
    """
    costly = torch.zeros_like(accepted)
    for those in costly_grades:
        costly = costly | ((grades >= those.start) & (grades < those.stop))
    left = counts - (accepted & costly).sum(1)
    return torch.minimum(counts, left.clamp(min=1))  # where a draft has ended its row, no other token came behind it


def make_report(tokens: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """All that the host reads of a step: int64 `[B, 6 + D + 1]`, `REPORT_FIELDS` (`[B]` each), then emitted tokens."""
    return torch.cat([torch.stack([columns[name] for name in REPORT_FIELDS], 1), tokens], 1)
