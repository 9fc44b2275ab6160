"""Multi-token prediction (2412.19437, section 2.2): the layer by which a model learnt to predict one token more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.checkpoints import read_checkpoint, read_names
from emssd_compile.drafters.autoregressive_head import AutoregressiveHead
from emssd_compile.drafters.decoder_layer import Attend, DecoderLayer
from emssd_compile.drafters.dynamic_tree import DynamicTree
from emssd_compile.drafters.head import Layout, Recipe
from emssd_compile.drafters.mtp_layouts import AppendedMTP, MiMoMTP, MTPConfig, QwenMTP, SpeculatorsMTP, is_of_mtp
from emssd_compile.errors import CheckpointError
from emssd_compile.numeric import flag


class MTP(AutoregressiveHead):
    """Drafts with the multi-token prediction layer of the target itself, in chains or in trees.

    Of a token and the target's hidden state of the one before it,

        h' = layer(W [norm(embedding) ; norm(h)])

    is normalised for the target's LM head, and takes the place of h for the next draft: one layer makes all drafts,
    though it was trained for the first one. The weights are in the target's own checkpoint, where transformers leaves
    them aside: `MTP.from_pretrained(folder)` reads these only.

    Args:
        config: sizes.
        num_draft_tokens: K, tokens of a chain; 3 unless there is a `tree`.
        tree: draft trees, and how large they grow (EAGLE-2, 2406.16858); None for chains.
        reads_normalised: whether hidden states are read behind the last norm, the target's and its own; else before it.

    Raises:
        OptionError: an option is out of range.
    """

    kind = "mtp"
    config_class: ClassVar[type[MTPConfig]] = MTPConfig
    layouts: ClassVar[tuple[Layout, ...]] = (SpeculatorsMTP(), MiMoMTP(), QwenMTP(), AppendedMTP())
    recipe = Recipe(learning_rate=5e-5, decay=0.6)
    borrows = ("embedding", "head")

    config: MTPConfig

    def __init__(
        self,
        config: MTPConfig,
        num_draft_tokens: int | None = None,
        *,
        tree: DynamicTree | None = None,
        reads_normalised: bool = True,
    ) -> None:
        sizes = config.layer
        super().__init__(config, sizes, 1, config.vocabulary, num_draft_tokens, tree, config.speculative_tokens)
        self.reads_normalised = flag("MTP reads_normalised", reads_normalised)
        self.taps = () if reads_normalised else (-1,)
        self.token_layernorm, self.hidden_layernorm, self.final_layernorm = (sizes.norm() for _ in range(3))
        self.input_proj = nn.Linear(2 * sizes.width, sizes.width, bias=False)
        self.layer = DecoderLayer(sizes)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Load the layer from the target's own checkpoint, of which the rest is not read, or from one of its own.

        Raises:
            CheckpointError: there is none, or it is damaged, or holds what is not supported.
            OptionError: an option is out of range.
        """
        config, names = read_names(folder)
        if cls.layout_of(config, names) is None:
            known = ", ".join(layout.name for layout in cls.layouts)
            raise CheckpointError(
                f"{folder} holds no layer for multi-token prediction; it is looked for as in: {known}"
            )
        return cls.of(read_checkpoint(folder, lambda name: is_of_mtp(config, name)), **options)

    def features_of(self, taps: Mapping[str | int, Tensor]) -> Tensor:
        """The target's last hidden states, `[..., H]`."""
        return taps["hidden" if self.reads_normalised else -1].to(self.input_proj.weight.dtype)

    def run(self, embedded: Tensor, features: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """What the layer gives, `[..., H]`."""
        joined = torch.cat([self.token_layernorm(embedded), self.hidden_layernorm(features)], -1)  # [..., 2 H]
        result: Tensor = self.layer(self.input_proj(joined), positions, attends[0])
        return result

    def next_features(self, outputs: Tensor) -> Tensor:
        """The outputs, normalised or as they are."""
        normalised: Tensor = self.final_layernorm(outputs)
        return normalised if self.reads_normalised else outputs

    def logits_of(self, outputs: Tensor) -> Tensor:
        """`[..., V]`, by the target's LM head."""
        weight = self.tables.head
        assert weight is not None, "prepare refuses a target without"
        return F.linear(self.final_layernorm(outputs).to(weight.dtype), weight, self.tables.head_bias)

    def table(self) -> Tensor:
        """The target's embedding."""
        assert self.tables.embedding is not None, "prepare refuses a target without"
        return self.tables.embedding
