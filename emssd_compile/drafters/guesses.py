"""What a model that drafts expects next, and what a `Draft` tells of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from emssd_compile.drafters.drawing import best, over, shaped
from emssd_compile.step.drafting import DraftContext
from emssd_compile.step.proposals import DETERMINISTIC


class Guess(NamedTuple):
    """The drafts behind equally many nodes of each row, all of a depth.

    Attributes:
        tokens: int64 `[R, W]`, the likeliest tokens behind each of R nodes, the likeliest first; or as they were drawn.
        probabilities: float32 `[R, W]`, what q gives each of them where it stands.
        proposal: float32 `[B, R / B, V]`, q, if they were drawn from it.
    """

    tokens: Tensor
    probabilities: Tensor
    proposal: Tensor | None


class Choose(Protocol):
    """Chooses the `count` drafts behind each node, `[R, count]`, from the logits of q, `[R, V]`; see `drawing.best`."""

    def __call__(self, logits: Tensor, count: int, depth: int, first_draft: int, context: DraftContext, /) -> Tensor:
        """Choose them."""
        ...


def guess(
    logits: Tensor, count: int, depth: int, first_draft: int, context: DraftContext, choose: Choose = best
) -> Guess:
    """The drafts that follow from the logits of the model, `[R, V]` of its own vocabulary.

    Args:
        logits: equally many nodes of each row, all of a depth.
        count: W, drafts behind each node.
        depth: of the nodes.
        first_draft: the drafts behind them are those of their rows from this one on.
        context: says how drafts are drawn, and for whom.
        choose: finds the tokens.
    """
    logits, proposal = logits.float(), None
    if context.drawn != DETERMINISTIC:
        logits = over(logits, context.vocabulary)
    logits = shaped(logits, context)
    if context.drawn != DETERMINISTIC:
        proposal = logits.softmax(1).view(context.known.shape[0], -1, context.vocabulary)
    tokens = choose(logits, count, depth, first_draft, context)
    probabilities = (logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)).exp()
    return Guess(tokens, probabilities, proposal)


def in_eighths(probabilities: Tensor) -> Tensor:
    """Grades 0 to 7, of the same shape."""
    return (probabilities * 8).long().clamp(0, 7)


def drawn_from(guesses: Sequence[Guess], num_draft_tokens: int) -> Tensor | None:
    """`Draft.proposal`, `[B, K + 1, V]`, of guesses in the order of their nodes; None if nothing was drawn."""
    lines = [guess.proposal for guess in guesses if guess.proposal is not None]
    if not lines:
        return None
    proposal = torch.cat(lines, 1)
    rows, nodes, vocabulary = proposal.shape
    leaves = proposal.new_zeros((rows, num_draft_tokens + 1 - nodes, vocabulary))
    return torch.cat([proposal, leaves], 1)
