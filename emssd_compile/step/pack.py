"""What a step feeds: the tokens of all rows side by side, with nothing between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emssd_compile.ops import WORD_BITS, pack_ancestors
from emssd_compile.step.fields import holds_tensors
from emssd_compile.step.nodes import Lineage, Nodes


@holds_tensors
@dataclass
class Packed:
    """The packed (jagged) batch of one step. `T` tokens; those from `offsets[B]` on are inert tail.

    Attributes:
        input_ids: int64 `[T]`.
        positions: int64 `[T]`, true position of each token in its row.
        row_ids: int64 `[T]`, row of each token; B for tail tokens.
        offsets: int64 `[B + 1]`, jagged offsets of the rows in T.
        fed: int64 `[B]`, tokens of each row in this step.
        ready: bool `[B]`, rows that read all they know in this step and so may emit.
        drafted: int64 `[B]`, drafts among the row's tokens: at its end.
        roots: int64 `[B]`, index into T of each ready row's newest known token; 0 elsewhere.
        slots: int64 `[T]`, KV slot of each token in its row; None where it is the position, as in chains.
        ancestors: int32 `[T, W]`, who sees whom (see `emssd::ragged_attention`); None where all are chains.
        depths: int64 `[B, K + 1]`, edges between each node and the root; None where all are chains.
    """

    input_ids: Tensor
    positions: Tensor
    row_ids: Tensor
    offsets: Tensor
    fed: Tensor
    ready: Tensor
    drafted: Tensor
    roots: Tensor
    slots: Tensor | None = None
    ancestors: Tensor | None = None
    depths: Tensor | None = None


def of_first_rows(packed: Packed, rows: Tensor) -> Packed:
    """The same batch for whoever looks at its first rows only; the others have no tokens in it.

    Args:
        packed: tokens of those rows, and inert tail.
        rows: int64 `[A]`, `arange` of how many.
    """
    by_row = {name: getattr(packed, name) for name in ("fed", "ready", "drafted", "roots", "depths")}
    return replace(
        packed,
        row_ids=packed.row_ids.clamp(max=rows.shape[0]),
        offsets=torch.cat([packed.offsets[:1], packed.offsets[rows + 1]]),
        **{name: value[rows] for name, value in by_row.items() if value is not None},
    )


def pack(
    history: Tensor,
    known: Tensor,
    lengths: Tensor,
    active: Tensor,
    token_range: Tensor,
    row_range: Tensor,
    share: int,
    draft: Nodes | None = None,
) -> Packed:
    """Choose and lay out the tokens of a step.

    Every active row wants to feed the tokens it knows but has not read, then its drafts. One rule covers decoding (one
    unread token and the drafts), prefill (the prompt) and chunked prefill (as much of it as fits): T is a budget.
    Each row first gets up to `share` tokens, so that long prompts do not stall rows that decode; what is left goes to
    the rows in order. A row whose unread tokens do not all fit emits nothing in this step and goes on in the next.

    Args:
        history: int64 `[B, C]`; only the first `known[b]` tokens of a row mean something.
        known: int64 `[B]`.
        lengths: int64 `[B]`.
        active: bool `[B]`.
        token_range: int64 `[T]`, `arange(T)`: its length is the budget.
        row_range: int64, `arange` of the most tokens that a row gets.
        share: tokens each row gets before any row gets more.
        draft: what to verify behind the known tokens; None for nothing. Only a row whose single unread token is its
            root verifies a tree.

    Example:
        lengths = [4, 7, 0], known = [5, 8, 3], draft.lengths = [2, 0, 0], T = 8 gives offsets = [0, 3, 4, 7],
        positions = [4, 5, 6, 7, 0, 1, 2, -] and one tail token.
    """
    budget = token_range.shape[0]
    pending = known - lengths
    wanted = torch.where(active, pending + _num_drafts(draft, pending), 0).clamp(max=row_range.shape[0])
    first = grant(wanted.clamp(max=share), budget)
    fed = first + grant(wanted - first, budget - first.sum())
    ends = fed.cumsum(0)
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
    row_ids = torch.searchsorted(ends, token_range, right=True)
    rows = row_ids.clamp(max=known.shape[0] - 1)
    tail = row_ids >= known.shape[0]
    index = torch.where(tail, 0, token_range - offsets[rows])  # [T], which of its row's tokens each token is
    slots = torch.where(tail, 0, lengths[rows] + index)  # [T]
    ready = active & (fed >= pending)
    packed = Packed(
        input_ids=history[rows, slots.clamp(max=history.shape[1] - 1)],
        positions=slots,
        row_ids=row_ids,
        offsets=offsets,
        fed=fed,
        ready=ready,
        drafted=torch.where(ready, fed - pending, 0),
        roots=torch.where(ready, offsets[:-1] + pending - 1, 0),
    )
    if draft is not None and draft.tokens.shape[1] > 0:
        draft_index = torch.where(tail, -1, index - pending[rows])  # [T], negative for tokens that are known
        in_range = draft_index.clamp(0, draft.tokens.shape[1] - 1)
        packed.input_ids = torch.where(draft_index < 0, packed.input_ids, draft.tokens[rows, in_range])
    return packed


def _num_drafts(draft: Nodes | None, pending: Tensor) -> Tensor | int:
    """Drafts that each row wants to verify, `[B]`."""
    if draft is None:
        return 0
    return draft.lengths if draft.parents is None else torch.where(pending == 1, draft.lengths, 0)


def pack_one_each(tokens: Tensor, positions: Tensor, going: Tensor) -> tuple[Packed, Tensor]:
    """Pack one token of each row that is going; also where in T each row's token lies (0 for the others).

    Args:
        tokens: int64 `[B]`.
        positions: int64 `[B]`, that of each row's token.
        going: bool `[B]`.
    """
    packed, order = pack_each(tokens[:, None], positions[:, None], going)
    return packed, order.squeeze(1)


def pack_each(tokens: Tensor, positions: Tensor, going: Tensor) -> tuple[Packed, Tensor]:
    """Pack n tokens of each row that is going; also where in T each lies, `[B, n]` (0 for those of other rows).

    Args:
        tokens: int64 `[B, n]`.
        positions: int64 `[B, n]`, that of each token.
        going: bool `[B]`.
    """
    num_rows, count = tokens.shape
    fed = going.to(positions.dtype) * count
    ends = fed.cumsum(0)
    places = torch.arange(num_rows * count, device=tokens.device)
    row_ids = torch.searchsorted(ends, places, right=True)
    rows = row_ids.clamp(max=num_rows - 1)
    tail = row_ids >= num_rows
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
    index = torch.where(tail, 0, places - offsets[rows])  # [T], which of its row's tokens each token is
    order = torch.where(going[:, None], offsets[:-1, None] + places[:count], 0)
    packed = Packed(
        input_ids=torch.where(tail, 0, tokens[rows, index]),
        positions=torch.where(tail, 0, positions[rows, index]),
        row_ids=row_ids,
        offsets=offsets,
        fed=fed,
        ready=going,
        drafted=torch.zeros_like(fed),
        roots=order[:, 0],
    )
    return packed, order


def as_trees(packed: Packed, lengths: Tensor, words: int, draft: Nodes | None = None) -> Packed:
    """The same batch for a model that was compiled for trees: with slots, true positions, and who sees whom.

    Args:
        packed: a batch as `pack` lays it out: as if all were chains.
        lengths: int64 `[B]`, tokens of each row whose KV is committed.
        words: W, words of `Packed.ancestors`; 32 W is at least K + 1.
        draft: the trees among its rows; None where there are chains only.
    """
    rows, tail = packed.row_ids.clamp(max=lengths.shape[0] - 1), packed.row_ids >= lengths.shape[0]  # [T]
    slots = packed.positions  # [T]
    index = torch.where(tail, 0, slots - lengths[rows])  # [T], the node, in a row with a tree
    columns = torch.arange(words * WORD_BITS, device=slots.device)  # [32 W]
    sees = columns <= index[:, None]  # [T, 32 W]
    if draft is None or draft.parents is None:
        return replace(packed, slots=slots, ancestors=pack_ancestors(sees))
    lineage = Lineage.of(draft.parents, draft.max_depth)
    width = lineage.depths.shape[1]  # N
    node = index.clamp(max=width - 1)  # [T]
    is_tree = (packed.drafted > 0)[rows] & ~tail  # [T]
    beyond = lineage.descends.new_zeros((*lineage.depths.shape, len(columns) - width))
    in_tree = torch.cat([lineage.descends, beyond], 2)[rows, node]  # [T, 32 W]
    return replace(
        packed,
        slots=slots,
        positions=torch.where(is_tree, lengths[rows] + lineage.depths[rows, node], slots),
        ancestors=pack_ancestors(torch.where(is_tree[:, None], in_tree, sees)),
        depths=lineage.depths,
    )


def grant(wanted: Tensor, budget: Tensor | int) -> Tensor:
    """Serve rows in order until the budget is spent."""
    before = wanted.cumsum(0) - wanted
    return torch.minimum(wanted, (budget - before).clamp(min=0))


@holds_tensors
@dataclass
class LogitRows:
    """Which packed tokens need a logit: each ready row's newest known token and its drafts.

    Attributes:
        index: int64 `[R]`, index into T; 0 for tail entries.
        offsets: int64 `[B + 1]`, jagged offsets of the rows in R.
        positions: int64 `[R]`, position in the row of the token that the logit *predicts*; 0 for tail entries.
        row_ids: int64 `[R]`, row of each entry, clamped to B - 1 for tail entries.
        nodes: int64 `[R]`, the node whose continuation it is: 0 for the root, i for the i-th draft; 0 for tail entries.
    """

    index: Tensor
    offsets: Tensor
    positions: Tensor
    row_ids: Tensor
    nodes: Tensor


def logit_rows(packed: Packed, known: Tensor, logit_range: Tensor) -> LogitRows:
    """Lay out the logits of a step. `logit_range` is `arange(R)`; R must be at least the number of logits needed."""
    counts = torch.where(packed.ready, packed.drafted + 1, 0)  # [B]
    ends = counts.cumsum(0)
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
    rows = torch.searchsorted(ends, logit_range, right=True)
    tail = rows >= known.shape[0]
    rows = rows.clamp(max=known.shape[0] - 1)
    node = torch.where(tail, 0, logit_range - offsets[rows])  # [R]
    depth = node if packed.depths is None else packed.depths[rows, node]  # [R]
    return LogitRows(
        index=torch.where(tail, 0, packed.roots[rows] + node),
        offsets=offsets,
        positions=torch.where(tail, 0, known[rows] + depth),
        row_ids=rows,
        nodes=node,
    )
