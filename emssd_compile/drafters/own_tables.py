"""Draft heads that may have an embedding and an LM head of their own, the latter for fewer tokens than there are."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.drafters.draft_vocabulary import most_frequent
from emssd_compile.drafters.head import DraftHead, HeadSizes
from emssd_compile.errors import OptionError


class TableSizes(HeadSizes, Protocol):
    """What the configuration of such a head says of its tables."""

    @property
    def draft_vocabulary(self) -> int:
        """Vd, tokens that it can draft."""
        ...

    @property
    def owns_embedding(self) -> bool:
        """Whether it has an embedding of its own, or reads the target's."""
        ...

    @property
    def owns_head(self) -> bool:
        """Whether it has an LM head of its own, or reads the target's."""
        ...


def check_borrowing(kind: str, width: int, config: TableSizes) -> None:
    """Raises OptionError if a head borrows a table, and its layers are not as wide as the target."""
    if width != config.hidden_size and not (config.owns_embedding and config.owns_head):
        raise OptionError(
            f"{kind} of width {width} cannot read the embedding or LM head of a target of width {config.hidden_size}; "
            "it needs both of its own"
        )


class OwnTables(DraftHead):
    """The tables of a head, its own or the target's.

    Attributes:
        draft_ids: int64 `[Vd]`, ascending, the tokens that it can draft; there only where they are not all.
    """

    config: TableSizes
    draft_ids: Tensor

    def make_tables(self, config: TableSizes, width: int) -> None:
        """Make those of its own, for vectors of that width, and say which are borrowed."""
        if config.owns_embedding:
            self.embed_tokens = nn.Embedding(config.vocabulary, width)
        if config.owns_head:
            self.lm_head = nn.Linear(width, config.draft_vocabulary, bias=False)
        if config.draft_vocabulary < config.vocabulary:
            self.register_buffer("draft_ids", torch.arange(config.draft_vocabulary))
        owned = {"embedding": config.owns_embedding, "head": config.owns_head}
        self.borrows = tuple(table for table, is_own in owned.items() if not is_own)

    @torch.no_grad()
    def begin(self, counts: Tensor) -> None:
        """Draft what the text says most; tables of its own begin as the target's, where those are as wide."""
        if self.config.draft_vocabulary < self.config.vocabulary:
            self.draft_ids.copy_(most_frequent(counts, self.config.draft_vocabulary))
        if self.config.owns_embedding:
            _take(self.embed_tokens.weight, self.tables.embedding)
        if self.config.owns_head:
            _take(self.lm_head.weight, self.tables.head, self.ids())

    def table(self) -> Tensor:
        """The embedding, `[V, H]`."""
        if self.config.owns_embedding:
            return self.embed_tokens.weight
        assert self.tables.embedding is not None, "prepare refuses a target without"
        return self.tables.embedding

    def ids(self) -> Tensor:
        """int64 `[Vd]`, ascending: the tokens that can be drafted."""
        if self.config.draft_vocabulary < self.config.vocabulary:
            return self.draft_ids
        return torch.arange(self.config.vocabulary, device=next(self.parameters()).device)

    def head_logits(self, normalised: Tensor) -> Tensor:
        """`[..., Vd]` of `[..., H]`, by the head's own LM head, or by the target's rows for what can be drafted."""
        if self.config.owns_head:
            own: Tensor = self.lm_head(normalised)
            return own
        weight, bias = self.tables.head, self.tables.head_bias
        assert weight is not None, "prepare refuses a target without"
        if self.config.draft_vocabulary < self.config.vocabulary:
            weight, bias = weight[self.draft_ids], None if bias is None else bias[self.draft_ids]
        return F.linear(normalised.to(weight.dtype), weight, bias)


def _take(own: Tensor, target: Tensor | None, ids: Tensor | None = None) -> None:
    """Copy the rows `ids` of the target's table `[V, H]`, or all, if it has one of that width with as many."""
    if target is None or target.shape[1] != own.shape[1]:
        return
    if ids is None and len(target) == len(own):
        own.copy_(target)
    elif ids is not None and int(ids[-1]) < len(target):
        own.copy_(target[ids.to(target.device)])
