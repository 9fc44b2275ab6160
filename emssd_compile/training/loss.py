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
LOSSES = ("tokens", "distribution", "acceptance")
OF_TOKENS = 0.1
"""What the tokens of the text count in the loss `"acceptance"`; the distance of distributions counts the rest."""


@dataclass(frozen=True)
class PositionScore:
    """Of the k-th drafts, means over all that count.

    Attributes:
        loss: float32 `[]`, in nats; has a gradient.
        accuracy: float32 `[2]`, how often the token is the likeliest draft, and among the five likeliest.
    """

    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class Drafts:
    """The k-th drafts of windows, at all places that have a token so far ahead.

    Attributes:
        logits: of the head, float `[B, S', V]`; -inf for tokens that it cannot say.
        tokens: what the text says there, int64 `[B, S']`.
        counts: bool `[B, S']`, which of them are to be learnt.
        teacher: the target's logits there, `[B, S', V]`; None where only the text is known.
        confidence: log-odds `[B, S']` that the head gives its drafts; None if it gives none.
    """

    logits: Tensor
    tokens: Tensor
    counts: Tensor
    teacher: Tensor | None
    confidence: Tensor | None = None

    @property
    def right(self) -> Tensor:
        """int64 `[B, S']`: what the target finds likeliest, or else what the text says."""
        return self.tokens if self.teacher is None else self.teacher.argmax(-1)


def drafts_of(head: DraftHead, features: Features, counts: Tensor, teacher: Tensor | None = None) -> Iterator[Drafts]:
    """The first drafts, the second ones, and so on.

    Args:
        head: what drafts.
        features: what the target computed.
        counts: bool `[B, S]`, which tokens count.
        teacher: `[B, S, V]`, the target's own logits.

    Raises:
        OptionError: a window is too short for as many drafts.
    """
    window = features.tokens.shape[1]
    for ahead, (logits, confidence) in enumerate(head.graded_rollout(features), start=1):
        if window < ahead + 2:
            raise OptionError(f"window={window} has no token that draft {ahead} could be; pass {ahead + 2} at least")
        here, there = slice(window - 1 - ahead), slice(1 + ahead, None)
        yield Drafts(
            logits[:, here],
            features.tokens[:, there],
            counts[:, there],
            None if teacher is None else teacher[:, ahead:-1],
            None if confidence is None else confidence[:, here],
        )
        del logits


def position_scores(
    head: DraftHead, features: Features, counts: Tensor, teacher: Tensor | None = None, loss: str | None = None
) -> Iterator[PositionScore]:
    """The scores of the first drafts, of the second ones, and so on.

    Of each position, its loss keeps what its gradient takes, `[B, S, V]` or more; the logits themselves are given up.

    Args:
        head: what drafts.
        features: what the target computed.
        counts: bool `[B, S]`, which tokens count.
        teacher: `[B, S, V]`, the target's own logits, to learn its distribution; None to learn the tokens.
        loss: one of `LOSSES`; by default the first without a teacher, the second with one.

    Raises:
        OptionError: a window is too short for as many drafts.
    """
    score = _SCORES[loss or LOSSES[teacher is not None]]
    for drafts in drafts_of(head, features, counts, teacher):
        yield score(drafts)


def score_tokens(drafts: Drafts) -> PositionScore:
    """Cross-entropy with the tokens; those that the head cannot say are left out."""
    return _score(drafts, _of_tokens(drafts))


def score_distribution(drafts: Drafts) -> PositionScore:
    """Cross-entropy with the distribution of the teacher; right is what it finds likeliest.

    Where the head says -inf, it cannot say the token: the teacher's distribution is that over the others, and where the
    teacher finds such a token likeliest, nothing is learnt.
    """
    cannot = drafts.logits == -torch.inf
    losses = -(_taught(drafts) * drafts.logits.float().log_softmax(-1).masked_fill(cannot, 0)).sum(-1)  # [B, S]
    return _score(drafts, losses)


def score_acceptance(drafts: Drafts) -> PositionScore:
    """What DSpark learns (2607.05147): the L1 distance of q and the target's p, and a little of the tokens.

    The distance is twice the probability that a token drawn from q is rejected.
    """
    distance = 2 * (1 - acceptance(drafts))  # [B, S]
    return _score(drafts, (1 - OF_TOKENS) * distance + OF_TOKENS * _of_tokens(drafts))


def acceptance(drafts: Drafts) -> Tensor:
    """`[B, S]`, how likely a token drawn from the head is accepted: the sum of min(p, q) over all tokens."""
    return torch.minimum(_taught(drafts), drafts.logits.float().softmax(-1)).sum(-1)


_SCORES = dict(zip(LOSSES, (score_tokens, score_distribution, score_acceptance), strict=True))


def _of_tokens(drafts: Drafts) -> Tensor:
    logits = drafts.logits.float().flatten(0, -2)
    losses = F.cross_entropy(logits, drafts.tokens.flatten(), reduction="none").view_as(drafts.tokens)
    return torch.where(losses == torch.inf, 0, losses)  # of what the head cannot say


def _taught(drafts: Drafts) -> Tensor:
    """`[B, S, V]`, the teacher's distribution over what the head can say."""
    assert drafts.teacher is not None, "without the target's logits there is no distribution"
    return drafts.teacher.float().masked_fill(drafts.logits == -torch.inf, -torch.inf).softmax(-1)


def _score(drafts: Drafts, losses: Tensor) -> PositionScore:
    """The means of losses `[B, S]`; how sure the head was is learnt, too, if it says so."""
    logits = drafts.logits.float()
    own = logits.gather(-1, drafts.right[..., None])  # [B, S, 1]
    counts = drafts.counts & (own[..., 0] != -torch.inf)
    if drafts.confidence is not None:
        wanted = acceptance(drafts).detach()
        losses = losses + F.binary_cross_entropy_with_logits(drafts.confidence.float(), wanted, reduction="none")
    number = counts.sum().clamp(min=1)
    better = (logits > own).sum(-1)  # [B, S], tokens that the head finds likelier than the right one
    hits = torch.stack([((better < top) & counts).sum() for top in TOP])  # [2]
    return PositionScore(torch.where(counts, losses, 0).sum() / number, hits / number)
