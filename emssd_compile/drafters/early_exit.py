"""The target's own layers draft: LayerSkip and SWIFT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emssd_compile.drafters.causal import CausalDrafter
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, shown
from emssd_compile.step.drafting import Draft, DraftContext, Target, TargetSizes
from emssd_compile.step.pack import pack_one_each


class EarlyExit(CausalDrafter):
    """The target without some of its layers drafts: its weights, its LM head and its KV cache, and nothing beside them.

    With the first E layers it is LayerSkip's (2404.16710): what layers below an exit compute of a token is the same in
    drafting and in verification, so what they have written of the text so far is theirs to read, and a model that was
    trained for early exits drafts well. With a choice of layers all over the model it is SWIFT's (2410.06916), which
    suits models that were not. It is found by trying which ones: draft a few hundred tokens of your own kind of text.

    The model drafts, a chain or a tree, as `CausalDrafter` says. KV of drafts goes to the target's caches behind the
    text, where verification writes it anew. Nothing has to be read beforehand, and no memory is needed.

    Args:
        layers: how many of the first layers draft, or which ones, by number and ascending, layer 0 among them.
        num_draft_tokens: K, tokens of a chain; 4 unless there is a `tree`.
        tree: how many tokens to draft behind the root, behind each of those, and so on.

    Raises:
        OptionError: an option is out of range; `optimize` says so of layers that the target does not have.
    """

    writes_kv = True

    def __init__(
        self,
        layers: int | Sequence[int],
        num_draft_tokens: int | None = None,
        *,
        tree: Sequence[int] | None = None,
    ) -> None:
        super().__init__(num_draft_tokens, tree)
        self.layers = _numbers(layers)

    def assisted(self) -> dict[str, object]:
        """The layer that is left early, if it is the first ones that draft; and K."""
        first = {"assistant_early_exit": len(self.layers)} if self.layers == (*range(len(self.layers)),) else {}
        return {**first, "num_assistant_tokens": self.num_draft_tokens}

    def check(self, sizes: TargetSizes) -> None:
        """See the target's sizes. Raises OptionError if it has no such layers."""
        if self.layers[-1] >= sizes.num_layers:
            raise OptionError(
                f"EarlyExit layers={list(self.layers)}: the model has layers 0 to {sizes.num_layers - 1} only; leave "
                "out those that it has not"
            )

    def prepare(self, target: Target) -> None:
        """Leave the other layers out.

        Raises:
            OptionError: the target has no such layers.
            UnsupportedModelError: it cannot be told what its layers are.
        """
        self._packed = target.with_layers(self.layers)

    def notes(self) -> tuple[str, ...]:
        """Which layers draft."""
        return (f"the target's layers {list(self.layers)} draft",)

    def forward(self, context: DraftContext) -> Draft:
        """Tokens `[B, K]`, lengths `[B]`, grades `[B, K]`, of trees parents `[B, K]`, and if drawn, what from."""
        known, roots = context.known, (context.known - 1).clamp(min=0)  # [B]
        max_drafts = torch.where(context.can_draft, context.max_drafts, 0)
        tokens = context.history.gather(1, roots[:, None]).squeeze(1)  # [B]
        packed, order = pack_one_each(tokens, roots, max_drafts > 0)
        first = self._predict(packed, roots, order, context, 0, self.tree.branching[0] if self.tree else 1)
        draft, _ = self._draft(first, max_drafts, known, context)
        return draft

    def _caches(self, context: DraftContext) -> dict[str, Tensor]:
        return {name: context.caches[name] for name in self._model.cache_shapes}


def _numbers(layers: object) -> tuple[int, ...]:
    """The layers that an option asks for, ascending."""
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        return tuple(range(integer("EarlyExit layers", layers, least=1)))
    numbers = tuple(integer(f"EarlyExit layers[{place}]", layer, least=0) for place, layer in enumerate(layers))
    if not numbers or numbers[0] != 0 or list(numbers) != sorted(set(numbers)):
        raise OptionError(
            f"EarlyExit layers={shown(layers)} must be ascending numbers of layers, each once, with layer 0 among them"
        )
    return numbers
