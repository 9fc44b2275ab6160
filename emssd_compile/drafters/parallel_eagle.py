"""P-EAGLE (2602.01469): an EAGLE-3 head that drafts all tokens in one pass, from mask tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emssd_compile.checkpoints import Checkpoint
from emssd_compile.drafters.dynamic_tree import DynamicTree
from emssd_compile.drafters.eagle3 import Eagle3
from emssd_compile.drafters.eagle3_config import Eagle3Config
from emssd_compile.drafters.eagle3_layouts import OriginalEagle3, SpeculatorsEagle3
from emssd_compile.drafters.head import Layout, Recipe
from emssd_compile.drafters.joint_attention import in_turn, over_nodes
from emssd_compile.drafters.layout_checks import configured, refused
from emssd_compile.drafters.speculators import TYPE
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.numeric import integer
from emssd_compile.step.drafting import Draft, DraftContext, Target

_HIDDEN, _TOKENS = "mask_hidden", ("mask_token_id", "ptd_token_id", "pard_token")


@dataclass(frozen=True)
class ParallelEagleConfig(Eagle3Config):
    """Sizes of a `ParallelEagle`: those of an `Eagle3`, with other defaults, and the mask token.

    Attributes:
        mask_token: its id, 0 to V - 1; -1 stands for the last one, which few vocabularies use.
    """

    num_layers: int = 4
    owns_embedding: bool = True
    speculative_tokens: int = 8
    mask_token: int = -1

    def __post_init__(self) -> None:
        """Raises OptionError if something is out of range, or parts of it do not go together."""
        super().__post_init__()
        if self.mask_token == -1:
            object.__setattr__(self, "mask_token", self.vocabulary - 1)
        integer("ParallelEagleConfig mask_token", self.mask_token, least=0, most=self.vocabulary - 1)


class SpeculatorsParallelEagle(SpeculatorsEagle3):
    """vllm-project/speculators, `speculators_model_type` peagle: its embedding is trained unless it says otherwise."""

    name = "speculators peagle"
    model_type = "peagle"
    architecture = "PEagleSpeculator"
    trains_embedding = True
    speculative_tokens = 8

    def read(self, checkpoint: Checkpoint) -> tuple[ParallelEagleConfig, dict[str, Tensor]]:
        """The head's configuration and weights."""
        return _with_mask(checkpoint, *super().read(checkpoint))

    def write(self, config: Any, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back."""
        entries, tensors = super().write(config, weights)
        return {**entries, "mask_token_id": config.mask_token}, tensors


class VllmParallelEagle(OriginalEagle3):
    """A flat configuration, as vLLM reads it, too; nothing says which layers it reads."""

    name = "P-EAGLE"
    trains_embedding = True
    speculative_tokens = 8

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By the tensor that no other head has."""
        return TYPE not in config and _HIDDEN in names

    def read(self, checkpoint: Checkpoint) -> tuple[ParallelEagleConfig, dict[str, Tensor]]:
        """The head's configuration and weights."""
        return _with_mask(checkpoint, *super().read(checkpoint))


def _with_mask(
    checkpoint: Checkpoint, config: Eagle3Config, weights: dict[str, Tensor]
) -> tuple[ParallelEagleConfig, dict[str, Tensor]]:
    """What was read as an `Eagle3`, and the mask: `mask_token_id`, or as vLLM calls it, and `mask_hidden`."""
    if not checkpoint.get("parallel_drafting", bool, True):
        raise refused(checkpoint, "parallel_drafting is false, and it has a mask_hidden; set it to true")
    found = [name for name in _TOKENS if checkpoint.config.get(name) is not None]
    mask_token = checkpoint.get((found or _TOKENS)[0], int)
    if mask_token < 0:
        raise refused(checkpoint, f"{found[0]} is {mask_token}; it is to be the id of a token")
    if _HIDDEN in weights:
        weights[_HIDDEN] = weights[_HIDDEN].reshape(1, 1, -1)  # vLLM's has one dimension less
    sizes = {field.name: getattr(config, field.name) for field in fields(config)}
    return configured(checkpoint, ParallelEagleConfig, **sizes, mask_token=mask_token), weights


class ParallelEagle(Eagle3):
    """An `Eagle3` that drafts all tokens in one pass, without feeding on its own (2602.01469).

    Behind the pair that has the root token come K - 1 pairs of the mask token and learned features, which stand for
    the layers' outputs. Each sees what is known, and the masks before it: the k-th predicts the k-th token behind the
    root. So drafts do not know one another, and it takes more layers than one.

    Args:
        config: sizes.
        num_draft_tokens: K, tokens of a chain; what the head was trained for by default.
        tree: None. It drafts chains.
        taps: layers of the target whose outputs are read, where the checkpoint does not say which.

    Raises:
        OptionError: an option is out of range, or nothing says which layers are read, or a tree is asked for.
    """

    kind = "peagle"
    config_class: ClassVar[type[ParallelEagleConfig]] = ParallelEagleConfig
    layouts: ClassVar[tuple[Layout, ...]] = (SpeculatorsParallelEagle(), VllmParallelEagle())
    recipe = Recipe(learning_rate=1e-4, distils=True)

    config: ParallelEagleConfig

    def __init__(
        self,
        config: ParallelEagleConfig,
        num_draft_tokens: int | None = None,
        *,
        tree: DynamicTree | None = None,
        taps: Sequence[int] | None = None,
    ) -> None:
        if tree is not None:
            raise OptionError(
                f"ParallelEagle tree={tree!r}: it drafts chains only, since its drafts do not know one another; pass "
                "num_draft_tokens, or take an Eagle3"
            )
        super().__init__(config, num_draft_tokens, taps=taps)
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, config.num_taps * config.hidden_size))
        self.spare_slots = self.num_draft_tokens - 1
        if self.num_draft_tokens > 1:
            # As a tree without branches: a row takes up to K tokens at a time here, where a chain's drafter takes two.
            self.max_depth = self.num_draft_tokens

    def prepare(self, target: Target) -> None:
        """See the target.

        Raises:
            DrafterError: as for `DraftHead`, or the embedding that it reads has no such mask token.
        """
        super().prepare(target)
        if self.config.mask_token >= len(self.table()):
            raise DrafterError(
                f"the mask token of the ParallelEagle is {self.config.mask_token}, and the target's embedding has "
                f"{len(self.table())} tokens; use a head with an embedding of its own"
            )

    def next_pair(self, tokens: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the mask, whatever was drafted."""
        features = self.projected(self._mask_outputs())  # [1, H]
        return self._embedded(torch.full_like(tokens, self.config.mask_token)), features.expand_as(outputs)

    def _mask_outputs(self) -> list[Tensor]:
        """What stands for the output of each layer that is read, `[1, Ht]` each."""
        return list(self.mask_hidden[0].chunk(self.config.num_taps, 1))

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new and the masks: tokens, grades and parents `[B, K]`, lengths `[B]`."""
        if self.max_depth is None:  # there are no masks
            return super().forward(context)
        read, known, caches, count = context.read, context.known, self._caches(context), self.num_draft_tokens
        tokens, taps, width = self._following(context), self._taps(context), known.shape[0] * (count - 1)
        length = tokens.shape[0]  # T
        pairs = zip((taps[tap] for tap in self.taps), self._mask_outputs(), strict=True)
        features = self.projected([torch.cat([one.to(mask.dtype), mask]) for one, mask in pairs])  # [T + 1, H]
        masks = tokens.new_full((width,), self.config.mask_token)
        ahead = torch.arange(count - 1, device=known.device)
        positions = (known - 1)[:, None] + ahead  # [B, K - 1]
        of_masks = over_nodes(caches, positions, going=context.max_drafts > 1)
        of_read = self._attends_to_read(context, caches)
        outputs = self.run(
            self._embedded(torch.cat([tokens, masks])),
            torch.cat([features[:length], features[length:].expand(width, -1)]),
            torch.cat([read.positions, positions.flatten()]),
            [in_turn(both, (length, width)) for both in zip(of_read, of_masks, strict=True)],
        )  # [T + B (K - 1), H]
        behind_masks = outputs[length:].unflatten(0, positions.shape)  # [B, K - 1, H]
        last = torch.cat([outputs[read.roots][:, None], behind_masks], 1)  # [B, K, H]
        logits = self.logits_of(last.flatten(0, 1)).unflatten(0, last.shape[:2])  # [B, K, Vd]
        chosen = [self._choose_of(logits[:, depth], 1, depth, context) for depth in range(count)]
        return self._chain_of(chosen, context)
