"""Classic two-model speculation: a smaller causal LM drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from emssd_compile.drafters.causal import CausalDrafter
from emssd_compile.drafters.vocabularies import difference
from emssd_compile.errors import DrafterError
from emssd_compile.step.drafting import Draft, DraftContext, Target, most_unread
from emssd_compile.step.pack import pack
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.tensor_spec import TensorSpec


class DraftModel(CausalDrafter):
    """A second causal LM, compiled by the same passes, with its own unpadded KV cache (2211.17192, 2302.01318).

    Each step it first reads the tokens it has not seen, all rows packed together: a chunk of the prompt in prefill, and
    what was accepted in decoding. Then it drafts, as `CausalDrafter` says. Of a chain, at most two tokens of a row are
    left to read later, the last draft and the one after it; of a tree what is accepted is read in the next step.

    A draft model may have fewer positions than the target: it drafts as far as they go, and rows that are longer decode
    without drafts. Its vocabulary may be padded to another size than the target's: an id past the target's ends a
    draft, and an id past its own is read as its last one.

    Args:
        model: a causal LM over the target's vocabulary.
        num_draft_tokens: K, tokens of a chain; 4 unless there is a `tree`.
        tree: how many tokens to draft behind the root, behind each of those, and so on.

    Raises:
        OptionError: an option is out of range, or both are given.

    Example:
        `tree=(4, 2, 2)` drafts the 4 likeliest tokens behind the root, and two more times the 2 likeliest behind each
        of the newest: K = 4 + 8 + 16 drafts, of which at most D = 3 are accepted.
    """

    reads_ahead = True
    any_rows = True

    def __init__(
        self, model: nn.Module, num_draft_tokens: int | None = None, *, tree: Sequence[int] | None = None
    ) -> None:
        super().__init__(num_draft_tokens, tree)
        self.model = model
        self._notes: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, path: str, num_draft_tokens: int | None = None, *, tree: Sequence[int] | None = None, **options: Any
    ) -> DraftModel:
        """Load a Hugging Face causal LM (`options` go to its `from_pretrained`) and draft with it."""
        return cls(load_causal_lm(path, **options), num_draft_tokens, tree=tree)

    def prepare(self, target: Target) -> None:
        """Compile the model.

        Raises:
            DrafterError: its vocabulary is not the target's, up to padding, or it has fewer tokens than the tree wants
                behind one node.
        """
        # The last level of a tree is never fed.
        vocabulary, nodes = target.vocabulary, 1 + sum(self.tree.levels[:-1]) if self.tree else 0
        packed = target.compile_model(self.model, tree_nodes=nodes)
        padding = difference(packed.vocabulary, vocabulary)
        if self.tree and max(self.tree.branching) > min(packed.vocabulary, vocabulary):
            raise DrafterError(
                f"{type(self).__name__} drafts {max(self.tree.branching)} tokens behind one node, and there are only "
                f"{min(packed.vocabulary, vocabulary)} in the vocabulary; draft fewer"
            )
        self._packed = packed
        self._notes = (
            *(
                [f"the draft model drafts up to position {packed.capacity}"]
                if packed.capacity < target.capacity
                else []
            ),
            *([f"vocabularies of {packed.vocabulary} and {vocabulary}: taken for padding"] if padding else []),
        )

    def assisted(self) -> dict[str, object]:
        """The model, and K."""
        return {"assistant_model": self.model, "num_assistant_tokens": self.num_draft_tokens}

    def notes(self) -> tuple[str, ...]:
        """In what the draft model and the target differ."""
        return self._notes

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """`lengths` int64 `[B]`, tokens whose KV the draft model has written, and its KV caches."""
        return {"lengths": TensorSpec((sizes.rows,), torch.int64), **self._model.cache_shapes}

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new, then draft.

        Tokens `[B, K]`, lengths `[B]`, grades `[B, K]`, of trees parents `[B, K]`, and if drafts are drawn, what from,
        `[B, K + 1, V]`.
        """
        known, capacity = context.known, self._model.capacity
        has_place = known <= capacity  # [B], whether the root token has a position
        # KV of drafts that were rejected is stale: it counts only up to the root token.
        lengths = torch.minimum(context.state["lengths"], (known - 1).clamp(min=0))
        packed = pack(
            history=context.history,
            known=known,
            lengths=lengths,
            active=context.active & has_place,
            token_range=context.draft_range,
            row_range=context.row_range,
            share=most_unread(self.max_depth),
        )
        max_drafts = torch.minimum(context.max_drafts, capacity - known + 1)  # [B], the deepest ones are not fed
        max_drafts = torch.where(context.can_draft & packed.ready, max_drafts, 0)
        first = self._predict(packed, lengths, packed.roots, context, 0, self.tree.branching[0] if self.tree else 1)
        draft, lengths = self._draft(first, max_drafts, lengths + packed.fed, context)
        return replace(draft, state={"lengths": lengths})

    def _caches(self, context: DraftContext) -> dict[str, Tensor]:
        return {name: context.state[name] for name in self._model.cache_shapes}


def load_causal_lm(path: str, **options: Any) -> nn.Module:
    """A Hugging Face causal LM in eval mode; `options` go to its `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.eval()
