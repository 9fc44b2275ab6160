"""What a step keeps: emitted tokens enter the history, lengths advance, rows end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.step.pack import LogitRows, Packed
from emssd_compile.step.state import COUNTERS, StepState

REPORT_FIELDS = ("counts", "active", "pending", "draft_lengths", "wanted")
"""Leading columns of a step's report; the emitted tokens follow.

`wanted` is the same in each line: how many drafts of all rows together the next step should verify, if there is room.
"""


@dataclass
class Emission:
    """What a step emits.

    Attributes:
        tokens: int64 `[B, K + 1]`, tokens emitted by each row; the first `counts[b]` mean something.
        counts: int64 `[B]`.
    """

    tokens: Tensor
    counts: Tensor


def bar_eos(logits: Tensor, rows: LogitRows, min_known: Tensor, is_eos: Tensor) -> Tensor:
    """Logits `[R, V]` with EOS impossible where a row is still too short."""
    barred = rows.positions < min_known[rows.row_ids]
    return logits.masked_fill(barred[:, None] & is_eos[None, :], -torch.inf)


def draft_tokens(history: Tensor, known: Tensor, num_draft_tokens: int) -> Tensor:
    """The drafts `[B, K]` that lie behind the known tokens (rubbish past a row's draft length)."""
    index = known[:, None] + torch.arange(num_draft_tokens, device=known.device)
    return history.gather(1, index.clamp(max=history.shape[1] - 1))


def commit(state: StepState, packed: Packed, accept_lengths: Tensor, next_tokens: Tensor) -> tuple[StepState, Emission]:
    """Apply a verdict to the state.

    A ready row emits its accepted drafts and then `next_tokens`, cut behind the first EOS and at the row's limit.
    Rejected tokens are rolled back by not advancing `lengths` over them.

    Args:
        state: the state the step began with.
        packed: what the step fed.
        accept_lengths: int64 `[B]`, drafts accepted.
        next_tokens: int64 `[B]`, the correction or bonus token.
    """
    num_draft_tokens = state.histogram.shape[0] - 1
    node = torch.arange(num_draft_tokens + 1, device=state.known.device)
    drafts = torch.cat([draft_tokens(state.history, state.known, num_draft_tokens), next_tokens[:, None]], 1)
    tokens = torch.where(node < accept_lengths[:, None], drafts, next_tokens[:, None])
    ends = state.is_eos[tokens] & (node <= accept_lengths[:, None])
    first_end = torch.where(ends, node, num_draft_tokens + 1).amin(1)
    counts = torch.minimum(torch.minimum(accept_lengths, first_end) + 1, state.limits - state.known)
    counts = torch.where(packed.ready, counts, 0)
    known = state.known + counts
    finished = packed.ready & ((first_end < counts) | (known >= state.limits))
    accepted = torch.minimum(accept_lengths, counts)
    new = StepState(
        history=write(state.history, state.known, tokens, counts),
        known=known,
        lengths=torch.where(packed.ready, known - 1, state.lengths + packed.fed),
        draft_lengths=torch.zeros_like(state.draft_lengths),
        active=state.active & ~finished,
        limits=state.limits,
        min_known=state.min_known,
        seeds=state.seeds,
        is_eos=state.is_eos,
        draft_budget=state.draft_budget,
        step_seconds=state.step_seconds,
        counters=state.counters + _counts(state, packed, accepted, counts),
        histogram=_count_acceptance(state.histogram, packed, accepted),
    )
    return new, Emission(tokens, counts)


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


def make_report(tokens: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """All that the host reads of a step: int64 `[B, 5 + K + 1]`, `REPORT_FIELDS` (`[B]` each), then emitted tokens."""
    return torch.cat([torch.stack([columns[name] for name in REPORT_FIELDS], 1), tokens], 1)
