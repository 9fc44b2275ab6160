"""``emssd::kept_threshold``: where to cut a vocabulary off, by rank and by the weight of what ranks higher."""

import torch
from torch import Tensor
from torch._ops import OpOverload

torch.library.define(
    "emssd::kept_threshold",
    "(Tensor keys, Tensor weights, Tensor most, Tensor share) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(keys: Tensor, weights: Tensor, most: Tensor, share: Tensor) -> Tensor:
    """The smallest key of each row that is kept.

    First those keys are kept that fewer than ``most`` are larger than. Of these then, those are that less than
    ``share`` of their weight is larger than, and the largest in any case. So equal keys are kept all or none: what a
    sort would leave to chance at the border has one answer, and there may be more than ``most``. Top-k and top-p of
    logits ``[3, 2, 2, 1]``, which weigh ``[8, 4, 4, 1]``::

        most = 2              ->  2, three of them are kept
        share = 0.5           ->  2, since 8 of 17 is less than a half
        most = 2, share = 0.5 ->  3, since 8 of 16 is not

    Weights are added in float64, so that the order of addition hardly matters: next to never is a key on one side of
    the border here and on the other there.

    Args:
        keys: float32 ``[R, V]``; may be infinite. A row that holds NaN has the threshold NaN, which nothing is below.
        weights: float32 ``[R, V]``, finite and at least 0; where ``share`` is 1 they do not matter.
        most: int64 ``[R]``, how many keys to keep; all if it is 0 or less, or more than there are.
        share: float32 ``[R]``, of the weight, from 0 to 1; 1 keeps all, also what weighs nothing.

    Returns:
        float32 ``[R]``.
    """
    ranked, order = keys.sort(dim=1, descending=True)
    size = keys.shape[1]
    rank = torch.where(most > 0, most, size).clamp(max=size) - 1  # [R], of the last of `most` keys
    by_rank = ranked >= ranked.gather(1, rank[:, None])  # [R, V], a prefix
    through = torch.where(by_rank, weights.gather(1, order), 0).double().cumsum(1)  # weight up to each key, itself too
    by_weight = (through < share[:, None] * through[:, -1:]).sum(1) + 1
    count = by_rank.sum(1)
    count = torch.where(share < 1, torch.minimum(count, by_weight), count)
    threshold = ranked.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.where(keys.isnan().any(1), torch.nan, threshold)


torch.library.impl("emssd::kept_threshold", "default", reference)


@torch.library.register_fake("emssd::kept_threshold")
def _fake(keys: Tensor, weights: Tensor, most: Tensor, share: Tensor) -> Tensor:
    return keys.new_empty(keys.shape[0])


kept_threshold: OpOverload = torch.ops.emssd.kept_threshold.default
