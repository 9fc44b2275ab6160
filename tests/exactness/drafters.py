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


class OracleTree(Drafter):
    """Trees of drafts, one path of which an `Oracle` drafts; the other nodes are rubbish, now and then the right token.

    Args:
        chain: what drafts the path; its K is the depth D.
        num_draft_tokens: K of the trees.
        shape: the parent of each draft, where all trees are alike; without it they look random, and some of their nodes
            are too deep or follow none before them.
    """

    def __init__(self, chain: Drafter, num_draft_tokens: int, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.chain = chain
        self.num_draft_tokens = num_draft_tokens
        self.max_depth = chain.num_draft_tokens
        self.shape = None if shape is None else list(shape)

    def forward(self, context: DraftContext) -> Draft:
        """Nodes in any order that has parents before their children."""
        known, index = context.known, torch.arange(self.num_draft_tokens)
        newest = context.history.gather(1, (known - 1).clamp(min=0)[:, None])
        path = self.chain(context)
        random = _scatter(known[:, None] + index, newest)  # [B, K]
        parents = random % (index + 1) if self.shape is None else torch.tensor(self.shape).expand(random.shape)
        depth, on_path = torch.zeros_like(random[:, :1]), torch.ones_like(random[:, :1], dtype=torch.bool)
        tokens = []
        for i in range(self.num_draft_tokens):
            parent = parents[:, i : i + 1]
            level = depth.gather(1, parent)  # [B, 1]
            first = ~((parents[:, :i] == parent) & on_path[:, 1:]).any(1, keepdim=True)
            right = on_path.gather(1, parent) & (level < path.lengths[:, None]) & first & (random[:, i : i + 1] % 4 > 0)
            token = path.tokens.gather(1, level.clamp(max=self.chain.num_draft_tokens - 1))
            tokens.append(torch.where(right, token, random[:, i : i + 1] % (VOCABULARY + 9) - 4))
            depth, on_path = torch.cat([depth, level + 1], 1), torch.cat([on_path, right], 1)
        if self.shape is None:
            parents = torch.where(
                random % 23 == 0, index + 1 + random % 3, parents
            )  # it follows itself, or a later one
        return Draft(torch.cat(tokens, 1), torch.full_like(known, self.num_draft_tokens), parents=parents)


def _scatter(*numbers: Tensor) -> Tensor:
    """Non-negative numbers that look random but follow from `numbers`."""
    mixed = sum(number * factor for number, factor in zip(numbers, (7919, 104729), strict=False))
    assert isinstance(mixed, Tensor)
    return (mixed * 48271 + 11).remainder(2147483647).bitwise_right_shift(5)
