"""Draft heads that know fewer tokens than the target: which they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emssd_compile.checkpoints import CONFIG, Checkpoint
from emssd_compile.errors import CheckpointError


def over_all(logits: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    """Logits of all tokens, `[..., V]`, from those `[..., Vd]` of the tokens `ids[Vd]`; -inf for the others."""
    return logits.new_full((*logits.shape[:-1], vocabulary), -torch.inf).scatter(-1, ids.expand_as(logits), logits)


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """The tokens of the highest counts `[V]`, the lower id first where they are the same: int64 `[size]`, ascending."""
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def read_draft_ids(checkpoint: Checkpoint, vocabulary: int) -> Tensor:
    """The target's id of each draft token, int64 `[Vd]`, ascending, of `d2t` (offsets to be added) and `t2d`.

    Raises:
        CheckpointError: `d2t` is missing, is no such list of the target's tokens, or is not what `t2d` says.
    """
    where, tensors = checkpoint.folder, checkpoint.tensors
    if "d2t" not in tensors:
        raise CheckpointError(f"{where} lacks the tensor d2t, which says what tokens its LM head is for")
    offsets = tensors["d2t"].long()
    if offsets.dim() != 1 or not len(offsets):
        raise CheckpointError(f"{where}: d2t is {list(offsets.shape)}; expected one number for each draft token")
    candidates = [offsets + torch.arange(len(offsets)), offsets]  # some exports hold ids themselves
    known = tensors["t2d"].bool().nonzero().squeeze(1) if "t2d" in tensors else None
    for ids in candidates:
        is_list = bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < vocabulary
        if is_list and (known is None or torch.equal(ids, known)):
            return ids
    raise CheckpointError(
        f"{where}: d2t is to hold what is to be added to each draft token to get an id below {vocabulary}, ascending"
        + ("" if known is None else ", and t2d to mark the same ids; they do not go together")
    )


def take_draft_ids(checkpoint: Checkpoint, weights: dict[str, Tensor], vocabulary: int, default: int) -> int:
    """Vd; `draft_ids` takes the place of `d2t` and `t2d` among the weights, if that is less than V.

    Args:
        checkpoint: what is read.
        weights: of its tensors; changed.
        vocabulary: V.
        default: Vd, where the config does not say it.

    Raises:
        CheckpointError: the maps do not fit, or are for another number of tokens.
    """
    size = checkpoint.get("draft_vocab_size", int, default)
    for name in ("d2t", "t2d"):
        weights.pop(name, None)
    if size < vocabulary:
        ids = read_draft_ids(checkpoint, vocabulary)
        if len(ids) != size:
            raise CheckpointError(
                f"{checkpoint.folder}: d2t is for {len(ids)} tokens, and {CONFIG} says draft_vocab_size = {size}"
            )
        weights["draft_ids"] = ids
    return size


def with_written_ids(weights: Mapping[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
    """The way back: `d2t` int64 `[Vd]` and `t2d` bool `[V]` in place of `draft_ids`, if that is among the weights."""
    tensors = dict(weights)
    ids = tensors.pop("draft_ids", None)
    if ids is None:
        return tensors
    marks = torch.zeros(vocabulary, dtype=torch.bool, device=ids.device)
    marks[ids] = True
    return tensors | {"d2t": ids - torch.arange(len(ids), device=ids.device), "t2d": marks}
