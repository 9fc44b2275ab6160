"""How well drafts do: loss and accuracy of each draft position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emssd_compile.drafters.head import DraftHead, Features
from emssd_compile.errors import OptionError

TOP = (1, 5)
"""A draft counts as right in two ways: it is the token, or among the five likeliest."""


@dataclass(frozen=True)
class PositionScore:
    """Of the k-th drafts, means over all that count.

    Attributes:
        loss: float32 `[]`, in nats; has a gradient.
        accuracy: float32 `[2]`, how often the token is the likeliest draft, and among the five likeliest.
    """

    loss: Tensor
    accuracy: Tensor


def position_scores(
    head: DraftHead, features: Features, counts: Tensor, teacher: Tensor | None = None
) -> Iterator[PositionScore]:
    """The scores of the first drafts, of the second ones, and so on.

    One position's logits `[B, S, V]` are held at a time: call `backward(retain_graph=True)` on a loss before the next.

    Args:
        head: what drafts.
        features: what the target computed.
        counts: bool `[B, S]`, which tokens count.
        teacher: `[B, S, V]`, the target's own logits, to learn its distribution; None to learn the tokens.

    Raises:
        OptionError: a window is too short for as many drafts.
    """
    window = features.tokens.shape[1]
    for ahead, logits in enumerate(head.rollout(features), start=1):
        if window < ahead + 2:
            raise OptionError(f"window={window} has no token that draft {ahead} could be; pass {ahead + 2} at least")
        drafts = logits[:, : window - 1 - ahead]  # [B, S - 1 - k, V]
        counted = counts[:, 1 + ahead :]  # [B, S - 1 - k]
        if teacher is None:
            yield score_tokens(drafts, features.tokens[:, 1 + ahead :], counted)
        else:
            yield score_distribution(drafts, teacher[:, ahead:-1], counted)
        del logits, drafts


def score_tokens(logits: Tensor, tokens: Tensor, counts: Tensor) -> PositionScore:
    """Cross-entropy with tokens `[B, S]`, in nats; those that the head cannot say (a logit of -inf) are left out."""
    logits = logits.float()
    own = logits.gather(-1, tokens[..., None])  # [B, S, 1]
    counts = counts & (own[..., 0] != -torch.inf)
    losses = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view_as(tokens)
    return _score(losses, logits, own, counts)


def score_distribution(logits: Tensor, teacher: Tensor, counts: Tensor) -> PositionScore:
    """Cross-entropy with the distribution of a teacher's logits, in nats; right is what the teacher finds likeliest.

    Where the head says -inf, it cannot say the token: the teacher's distribution is that over the others, and where the
    teacher finds such a token likeliest, nothing is learnt.
    """
    logits, teacher = logits.float(), teacher.float()
    cannot = logits == -torch.inf
    own = logits.gather(-1, teacher.argmax(-1, keepdim=True))  # [B, S, 1]
    counts = counts & (own[..., 0] != -torch.inf)
    probabilities = teacher.masked_fill(cannot, -torch.inf).softmax(-1)
    losses = -(probabilities * logits.log_softmax(-1).masked_fill(cannot, 0)).sum(-1)  # [B, S]
    return _score(losses, logits, own, counts)


def _score(losses: Tensor, logits: Tensor, own: Tensor, counts: Tensor) -> PositionScore:
    number = counts.sum().clamp(min=1)
    better = (logits > own).sum(-1)  # [B, S], tokens that the head finds likelier than the right one
    hits = torch.stack([((better < top) & counts).sum() for top in TOP])  # [2]
    return PositionScore(torch.where(counts, losses, 0).sum() / number, hits / number)
