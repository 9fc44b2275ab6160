"""EAGLE-3 (2503.01840): a draft head that reads three layers of the target, and trees that grow where it is sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from emssd_compile.drafters.autoregressive_head import AutoregressiveHead
from emssd_compile.drafters.decoder_layer import MLP, Attend, Attention, DecoderLayer, LayerSizes
from emssd_compile.drafters.dynamic_tree import DynamicTree
from emssd_compile.drafters.eagle3_config import Eagle3Config, default_taps
from emssd_compile.drafters.eagle3_layouts import OriginalEagle3, SpeculatorsEagle3
from emssd_compile.drafters.head import Layout, Recipe
from emssd_compile.drafters.own_tables import OwnTables
from emssd_compile.step.drafting import TargetSizes


class Eagle3(OwnTables, AutoregressiveHead):
    """Drafts from an early, a middle and a late layer of the target (2503.01840), in chains or in trees.

    The outputs of those layers are put side by side and projected to g_p. The first layer attends with
    `[norm(embedding); norm(g)]`, and adds to g; what comes out is normalised for the LM head, and as it is takes the
    place of g for the next draft. EAGLE-3.1 normalises each layer's output by itself, and feeds on what is normalised.
    An LM head for fewer tokens than the target has makes drafting cheaper; the others are never drafted.

    Args:
        config: sizes.
        num_draft_tokens: K, tokens of a chain; what the head was trained for, unless there is a `tree`.
        tree: draft trees, and how large they grow (EAGLE-2, 2406.16858); None for chains.
        taps: layers of the target whose outputs are read, where the checkpoint does not say which.

    Raises:
        OptionError: an option is out of range, or nothing says which layers are read.
    """

    kind = "eagle3"
    config_class: ClassVar[type[Eagle3Config]] = Eagle3Config
    layouts: ClassVar[tuple[Layout, ...]] = (SpeculatorsEagle3(), OriginalEagle3())
    recipe = Recipe(learning_rate=1e-4, decay=0.8, distils=True)

    config: Eagle3Config

    def __init__(
        self,
        config: Eagle3Config,
        num_draft_tokens: int | None = None,
        *,
        tree: DynamicTree | None = None,
        taps: Sequence[int] | None = None,
    ) -> None:
        config = config.reading(taps)
        sizes, width = config.layer, config.layer.width
        super().__init__(
            config, sizes, config.num_layers, config.draft_vocabulary, num_draft_tokens, tree, config.speculative_tokens
        )
        self.config, self.taps = config, tuple(config.taps or ())
        features = config.num_taps * config.hidden_size
        self.input_norm = sizes.norm(features) if config.normalises_features else nn.Identity()
        self.fc_norm = nn.ModuleList(sizes.norm(config.hidden_size) for _ in range(config.num_norms))
        self.fc = nn.Linear(features, width, bias=False)
        self.layers = nn.ModuleList([FirstLayer(sizes, adds_normalised=config.adds_normalised)])
        self.layers.extend(DecoderLayer(sizes) for _ in range(config.num_layers - 1))
        self.norm = sizes.norm()
        self.make_tables(config, width)

    @classmethod
    def for_target(cls, target: TargetSizes, **sizes: Any) -> Self:
        """A head to be trained; it reads the layers that EAGLE-3 does, unless `taps` are among the sizes."""
        return super().for_target(target, **{"taps": default_taps(target.num_layers), **sizes})

    def features_of(self, taps: Mapping[str | int, Tensor]) -> Tensor:
        """The layers' outputs, normalised as the head's version has it, side by side and projected to `[..., H]`."""
        return self.projected([taps[tap] for tap in self.taps])

    def projected(self, outputs: Sequence[Tensor]) -> Tensor:
        """`[..., H]` of the outputs `[..., Ht]` of each layer that is read."""
        outputs = [output.to(self.fc.weight.dtype) for output in outputs]
        if self.config.num_norms:
            outputs = [norm(output) for norm, output in zip(self.fc_norm, outputs, strict=True)]
        features: Tensor = self.fc(self.input_norm(torch.cat(outputs, -1)))
        return features

    def run(self, embedded: Tensor, features: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """What the last layer gives, `[..., H]`."""
        outputs: Tensor = self.layers[0](embedded, features, positions, attends[0])
        for layer, attend in zip(self.layers[1:], attends[1:], strict=True):
            outputs = layer(outputs, positions, attend)
        return outputs

    def next_features(self, outputs: Tensor) -> Tensor:
        """The outputs as they are; of EAGLE-3.1 normalised."""
        return self.norm(outputs) if self.config.feeds_on_normalised else outputs

    def logits_of(self, outputs: Tensor) -> Tensor:
        """`[..., Vd]`, of the outputs normalised."""
        return self.head_logits(self.norm(outputs))


class FirstLayer(nn.Module):
    """The layer that a token and features go into.

    Args:
        sizes: of the layer.
        adds_normalised: add to the features as they are attended with, normalised, rather than as they came.
    """

    def __init__(self, sizes: LayerSizes, *, adds_normalised: bool) -> None:
        super().__init__()
        self.adds_normalised = adds_normalised
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (sizes.norm() for _ in range(3))
        self.self_attn, self.mlp = Attention(sizes, 2 * sizes.width), MLP(sizes)

    def forward(self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`[..., H]` for embeddings and features `[..., H]` at `positions[...]`."""
        normalised = self.hidden_norm(features)
        joined = torch.cat([self.input_layernorm(embedded), normalised], -1)  # [..., 2 H]
        x = (normalised if self.adds_normalised else features) + self.self_attn(joined, positions, attend)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result
