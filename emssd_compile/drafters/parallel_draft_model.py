"""PARD: a causal LM that drafts all tokens in one pass, from mask tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from emssd_compile.drafters.draft_model import DraftModel, load_causal_lm
from emssd_compile.drafters.guesses import Guess, guess, in_eighths
from emssd_compile.errors import DrafterError
from emssd_compile.numeric import integer
from emssd_compile.step.drafting import Draft, DraftContext, Target, most_unread
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.pack import Packed, pack
from emssd_compile.step.proposals import DETERMINISTIC


class ParallelDraftModel(DraftModel):
    """A second causal LM that was trained to predict several tokens at once (PARD, 2504.18583).

    Behind the tokens of a row that it has not read it reads K - 1 mask tokens: what it says behind the root is the
    first draft, what it says behind the j-th mask token is draft j + 1. All in one pass, where a `DraftModel` needs K.
    KV of mask tokens is not kept. Drafts do not know one another, so they are right less often the further out they
    are: it takes a model that was trained for this.

    Args:
        model: a causal LM over the target's vocabulary, trained with mask tokens.
        mask_token: the id of the mask token, in the model's vocabulary.
        num_draft_tokens: K.

    Raises:
        OptionError: an option is out of range.
    """

    def __init__(self, model: nn.Module, mask_token: int, num_draft_tokens: int = 8) -> None:
        super().__init__(model, num_draft_tokens)
        self.mask_token = integer("ParallelDraftModel mask_token", mask_token, least=0)
        self.proposes = (DETERMINISTIC,)
        # As a tree without branches: a row takes K + 1 tokens at a time here, where a chain's drafter takes two.
        self.max_depth = self.num_draft_tokens

    @classmethod
    def from_pretrained(  # type: ignore[override]  # it has no tree
        cls, path: str, mask_token: int, num_draft_tokens: int = 8, **options: Any
    ) -> Self:
        """Load a Hugging Face causal LM (`options` go to its `from_pretrained`) and draft with it."""
        return cls(load_causal_lm(path, **options), mask_token, num_draft_tokens)

    def prepare(self, target: Target) -> None:
        """Compile the model.

        Raises:
            DrafterError: its vocabulary is not the target's, up to padding, or has no such mask token.
        """
        super().prepare(target)
        if self.mask_token >= self._model.vocabulary:
            raise DrafterError(
                f"ParallelDraftModel mask_token={self.mask_token}: the draft model knows {self._model.vocabulary} "
                "tokens; pass the id that it was trained with"
            )

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new and the mask tokens: tokens, grades and parents `[B, K]`, lengths `[B]`."""
        known, capacity, count = context.known, self._model.capacity, self.num_draft_tokens
        lengths = torch.minimum(context.state["lengths"], (known - 1).clamp(min=0))
        masks = torch.full((known.shape[0], count - 1), self.mask_token, device=known.device)  # [B, K - 1]
        wanted = torch.minimum(context.max_drafts - 1, capacity - known)  # [B], mask tokens
        packed = pack(
            history=context.history,
            known=known,
            lengths=lengths,
            active=context.active & (known <= capacity),
            token_range=context.draft_range,
            row_range=context.row_range,
            share=most_unread(self.max_depth),
            draft=Nodes(masks, wanted.clamp(0, count - 1), masks, None, count - 1),
        )
        places = torch.arange(count, device=known.device)  # [K]
        index = packed.roots[:, None] + torch.minimum(places, packed.drafted[:, None])  # [B, K]
        guesses = self._guesses(packed, lengths, index, context)
        tokens = torch.cat([one.tokens for one in guesses], 1)  # [B, K]
        grades = in_eighths(torch.cat([one.probabilities for one in guesses], 1))
        most = torch.minimum(context.max_drafts, packed.drafted + 1)  # [B]
        most = torch.where(context.can_draft & packed.ready, most, 0)
        read = lengths + packed.fed - packed.drafted  # [B]
        return Draft(tokens, most, {"lengths": read}, grades, parents=places.expand(known.shape[0], -1))

    def _guesses(self, packed: Packed, lengths: Tensor, index: Tensor, context: DraftContext) -> list[Guess]:
        """One for each depth, `[B, 1]`, of the packed tokens that `index[B, K]` names."""
        caches = self._caches(context)
        readable = packed.input_ids.clamp(max=self._model.vocabulary - 1)  # [T]
        _, logits = self._model(replace(packed, input_ids=readable), lengths, index.flatten(), caches)  # [B K, V]
        each = logits.unflatten(0, index.shape).unbind(1)  # [B, V]
        return [guess(here, 1, depth, depth, context, self._choose) for depth, here in enumerate(each)]
