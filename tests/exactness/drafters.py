"""Drafters that know too much or too little: whatever is drafted, the tokens are the model's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emssd_compile.drafters import Draft, DraftContext, Drafter
from tests.zoo import VOCABULARY


class Oracle(Drafter):
    """Drafts from texts that it is given: the continuation of the text that the row began with, if there is one.

    Args:
        texts: prompts together with what the model makes of them.
        capacity: C, tokens of a row.
        num_draft_tokens: K.
        wrong_of_seven: how many of every seven drafts to spoil, at places that look random: 0 makes every draft right,
            7 every draft wrong.
        ragged: draft 0 to K tokens, a number that looks random, rather than K.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        capacity: int,
        num_draft_tokens: int,
        *,
        wrong_of_seven: int,
        ragged: bool = False,
    ) -> None:
        super().__init__()
        self.num_draft_tokens = num_draft_tokens
        self.wrong_of_seven = wrong_of_seven
        self.ragged = ragged
        rows = [[*text, *([-1] * (capacity + num_draft_tokens - len(text)))] for text in texts]
        self.register_buffer("texts", torch.tensor(rows))
        self.texts: Tensor

    def forward(self, context: DraftContext) -> Draft:
        """The text that goes on from the known tokens."""
        history, known = context.history, context.known
        place = torch.arange(history.shape[1])
        same = (history[:, None] == self.texts[None, :, : history.shape[1]]) | (place >= known[:, None, None])
        found = same.all(-1)
        index = known[:, None] + torch.arange(self.num_draft_tokens)
        tokens = self.texts[found.int().argmax(1)].gather(1, index.clamp(max=self.texts.shape[1] - 1))
        spoilt = (_scatter(index, history[:, :1]) % 7 < self.wrong_of_seven) & (tokens >= 0)
        tokens = torch.where(spoilt, (tokens + 1) % VOCABULARY, tokens)
        lengths = torch.where(found.any(1), self.num_draft_tokens, 0)
        if self.ragged:
            lengths = torch.minimum(lengths, _scatter(known, history[:, 0]) % (self.num_draft_tokens + 1))
        return Draft(tokens, lengths)


class Rubbish(Drafter):
    """Drafts numbers that look random, some of them no tokens, and claims any number of them, also impossible ones."""

    def __init__(self, num_draft_tokens: int) -> None:
        super().__init__()
        self.num_draft_tokens = num_draft_tokens

    def forward(self, context: DraftContext) -> Draft:
        """Rubbish, ids outside the vocabulary included."""
        known = context.known[:, None]
        newest = context.history.gather(1, (known - 1).clamp(min=0))
        index = known + torch.arange(self.num_draft_tokens)
        tokens = _scatter(index, newest) % (VOCABULARY + 20) - 10
        lengths = _scatter(known, newest).squeeze(1) % (self.num_draft_tokens + 4) - 1
        return Draft(tokens, lengths)


def _scatter(*numbers: Tensor) -> Tensor:
    """Non-negative numbers that look random but follow from `numbers`."""
    mixed = sum(number * factor for number, factor in zip(numbers, (7919, 104729), strict=False))
    assert isinstance(mixed, Tensor)
    return (mixed * 48271 + 11).remainder(2147483647).bitwise_right_shift(5)
