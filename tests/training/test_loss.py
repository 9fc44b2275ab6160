import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from emssd_compile.drafters import DraftHead
from emssd_compile.drafters.head import Features
from emssd_compile.errors import OptionError
from emssd_compile.training.loss import (
    LOSSES,
    Drafts,
    position_scores,
    score_acceptance,
    score_distribution,
    score_tokens,
)

B, S, V, DEPTH = 2, 7, 9, 3


class Given(DraftHead):
    """Says what it is told to."""

    def __init__(self, logits: list[Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.logits = logits

    def rollout(self, features: Features) -> Iterator[Tensor]:
        yield from self.logits


def made() -> tuple[list[Tensor], Features, Tensor, Tensor]:
    logits = [torch.randn(B, S, V, requires_grad=True) for _ in range(DEPTH)]
    tokens = torch.randint(V, (B, S))
    return logits, Features(tokens, torch.empty(0), {}), torch.rand(B, S) > 0.3, torch.randn(B, S, V)


def expected(
    logits: Tensor, ahead: int, features: Features, counts: Tensor, teacher: Tensor | None, learns: str
) -> Any:
    """Loss and accuracies of the k-th drafts, one token at a time."""
    losses, top1, top5 = [], [], []
    for row in range(B):
        for place in range(S):
            drafted = place + 1 + ahead
            if drafted >= S or not counts[row, drafted]:
                continue
            scores = logits[row, place]
            log_q = [float(x) - math.log(sum(math.exp(float(y)) for y in scores)) for x in scores]
            if teacher is None:
                right = int(features.tokens[row, drafted])
                losses.append(-log_q[right])
            else:
                own = teacher[row, drafted - 1]  # where the target predicts that token
                right, p = int(own.argmax()), own.softmax(0).tolist()
                if learns == "distribution":
                    losses.append(-sum(each * q for each, q in zip(p, log_q, strict=True)))
                else:
                    distance = sum(abs(each - math.exp(q)) for each, q in zip(p, log_q, strict=True))
                    losses.append(0.9 * distance - 0.1 * log_q[int(features.tokens[row, drafted])])
            rank = sorted(range(V), key=lambda token: -log_q[token]).index(right)
            top1.append(rank < 1)
            top5.append(rank < 5)
    return tuple(sum(each) / len(each) for each in (losses, top1, top5))


@pytest.mark.parametrize("learns", LOSSES)
def test_scores_are_those_of_the_formula(learns):
    logits, features, counts, teacher = made()
    given = None if learns == "tokens" else teacher
    scores = list(position_scores(Given(logits), features, counts, given, learns))
    assert len(scores) == DEPTH
    for ahead, score in enumerate(scores, start=1):
        loss, top1, top5 = expected(logits[ahead - 1].detach(), ahead, features, counts, given, learns)
        assert float(score.loss.detach()) == pytest.approx(loss, rel=1e-5)
        assert score.accuracy.tolist() == pytest.approx([top1, top5])


def test_gradients_are_those_of_the_mean():
    logits, features, counts, _ = made()
    (score, *_) = position_scores(Given(logits), features, counts)
    score.loss.backward()
    own = logits[0].detach().requires_grad_()
    wanted = counts[:, 2:]
    losses = own[:, : S - 2].log_softmax(-1).gather(-1, features.tokens[:, 2:, None])[..., 0]
    (-losses[wanted].mean()).backward()
    torch.testing.assert_close(logits[0].grad, own.grad)


def test_what_a_head_cannot_say_is_not_learnt():
    logits = torch.randn(1, 3, 4)
    logits[..., 3] = -torch.inf
    logits.requires_grad_()
    counts = torch.ones(1, 3, dtype=torch.bool)
    tokens = torch.tensor([[0, 3, 1]])
    score = score_tokens(Drafts(logits, tokens, counts, None))
    log_q = logits.detach()[..., :3].log_softmax(-1)
    assert float(score.loss.detach()) == pytest.approx(float(-(log_q[0, 0, 0] + log_q[0, 2, 1]) / 2))
    score.loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, 1].any()

    logits.grad = None
    teacher = torch.randn(1, 3, 4)
    teacher[0, 1, 3] = 9  # where it finds it likeliest, nothing is learnt
    teacher[0, [0, 2], 3] = -1
    score = score_distribution(Drafts(logits, tokens, counts, teacher))
    p = teacher[..., :3].softmax(-1)
    assert float(score.loss.detach()) == pytest.approx(float(-(p * log_q).sum(-1)[0, [0, 2]].mean()), rel=1e-5)
    score.loss.backward()
    gradient = torch.as_tensor(logits.grad)
    assert gradient.isfinite().all()
    assert not gradient[0, 1].any()

    logits.grad = None
    tokens = torch.tensor([[3, 0, 1]])  # of the text, the first cannot be said; the teacher's distribution still counts
    score = score_acceptance(Drafts(logits, tokens, counts, teacher))
    distance = (p - log_q.exp()).abs().sum(-1)[0, [0, 2]]
    assert float(score.loss.detach()) == pytest.approx(
        float((0.9 * distance.sum() - 0.1 * log_q[0, 2, 1]) / 2), rel=1e-5
    )
    score.loss.backward()
    assert torch.as_tensor(logits.grad).isfinite().all()


def test_how_sure_a_head_is_is_learnt_from_what_would_be_accepted():
    """The gradient of its log-odds is sigmoid(x) minus the share of draws that the target accepts; no other has one."""
    logits, features, counts, teacher = made()
    drafts = Drafts(logits[0], features.tokens, counts, teacher, torch.randn(B, S, requires_grad=True))
    confidence = torch.as_tensor(drafts.confidence)
    score_distribution(drafts).loss.backward()
    accepted = torch.minimum(teacher.softmax(-1), logits[0].detach().softmax(-1)).sum(-1)
    wanted = torch.where(counts, confidence.detach().sigmoid() - accepted, 0) / counts.sum()
    torch.testing.assert_close(confidence.grad, wanted)
    of_logits = logits[0].grad
    logits[0].grad = None
    score_distribution(Drafts(logits[0], features.tokens, counts, teacher)).loss.backward()
    torch.testing.assert_close(logits[0].grad, of_logits)


def test_where_nothing_counts_the_loss_is_nothing():
    logits, features, counts, _ = made()
    (score, *_) = position_scores(Given(logits), features, torch.zeros_like(counts))
    assert score.loss.item() == 0
    assert score.accuracy.tolist() == [0, 0]


def test_a_window_too_short_for_the_drafts_is_refused():
    logits, features, counts, _ = made()
    features = Features(features.tokens[:, :4], features.hidden, {})
    with pytest.raises(OptionError, match="window=4 has no token that draft 3 could be; pass 5"):
        list(position_scores(Given([each[:, :4] for each in logits]), features, counts[:, :4]))
