"""Multi-token prediction (2412.19437, section 2.2): the layers by which a model learnt to predict more tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.checkpoints import read_checkpoint, read_names
from emssd_compile.drafters.autoregressive_head import AutoregressiveHead
from emssd_compile.drafters.decoder_layer import Attend, DecoderLayer, LayerSizes
from emssd_compile.drafters.dynamic_tree import DynamicTree
from emssd_compile.drafters.head import Features, Layout, Recipe
from emssd_compile.drafters.head_attention import SelfFedAttention
from emssd_compile.drafters.joint_attention import in_turn, over_nodes
from emssd_compile.drafters.last_read import LastRead
from emssd_compile.drafters.mtp_config import MTPConfig
from emssd_compile.drafters.mtp_layouts import AppendedMTP, MiMoMTP, QwenMTP, SpeculatorsMTP, is_of_mtp
from emssd_compile.errors import CheckpointError, OptionError
from emssd_compile.numeric import flag
from emssd_compile.step.drafting import Draft, DraftContext
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.tensor_spec import TensorSpec


class MTP(AutoregressiveHead):
    """Drafts with the multi-token prediction modules of the target itself.

    Of a token and the target's hidden state h of the one before it, a module makes

        h' = layer(W [norm(embedding) ; norm(h)]),

    which is normalised for the target's LM head. The weights are in the target's own checkpoint, where transformers
    leaves them aside: `MTP.from_pretrained(folder)` reads these only.

    One module makes all drafts, in chains or in trees: h' takes the place of h for the next draft, though the module
    was trained for the first one. Of several modules each makes one draft, as they were trained, and K is at most their
    number: module k reads the h' of module k - 1 at the same position, and the token k behind it. So at the last K - 1
    positions a module has read drafts that may be wrong, and they are read again when it is known what follows. (A
    row that starts behind a prompt that another has read keeps what that one read at those positions.)

    Args:
        config: sizes.
        num_draft_tokens: K, tokens of a chain; 3 of one module and the number of several, unless there is a `tree`.
        tree: draft trees, and how large they grow (EAGLE-2, 2406.16858); None for chains. Of one module only.
        reads_normalised: whether hidden states are read behind the last norm, the target's and its own; else before it.

    Raises:
        OptionError: an option is out of range, or there are several modules and a tree, or more drafts than modules.
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
        sizes, modules = config.layer, config.num_modules
        super().__init__(config, sizes, 1, config.vocabulary, num_draft_tokens, tree, config.speculative_tokens)
        if modules > 1 and tree is not None:
            raise OptionError(
                f"an MTP of {modules} modules drafts chains only; pass num_draft_tokens instead of a tree"
            )
        if 1 < modules < self.num_draft_tokens:
            raise OptionError(
                f"MTP num_draft_tokens={self.num_draft_tokens} is out of range: each of its {modules} modules makes "
                f"one draft; pass at most {modules}"
            )
        self.reads_normalised = flag("MTP reads_normalised", reads_normalised)
        self.taps = () if reads_normalised else (-1,)
        self.mtp_layers = nn.ModuleList(MTPModule(sizes) for _ in range(modules))
        self.last_read: LastRead | None = None
        if modules > 1 and self.num_draft_tokens > 1:
            self.last_read = LastRead(self.num_draft_tokens - 1)
            # As a tree without branches: a row takes up to K - 1 tokens more here than it has read.
            self.num_layers = self.max_depth = self.num_draft_tokens
            self.spare_slots = self.last_read.count

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Load the modules from the target's own checkpoint, of which the rest is not read, or from one of their own.

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

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """KV caches of the modules, and of several the target's features of what was read last."""
        caches = super().tensors(sizes)
        if self.last_read is None:
            return caches
        return caches | self.last_read.tensors(sizes.rows, self.config.hidden_size, caches["k_cache_0"].dtype)

    def features_of(self, taps: Mapping[str | int, Tensor]) -> Tensor:
        """The target's last hidden states, `[..., H]`."""
        return taps["hidden" if self.reads_normalised else -1].to(next(self.parameters()).dtype)

    def run(self, embedded: Tensor, features: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """What the one module gives, `[..., H]`."""
        result: Tensor = self.mtp_layers[0](embedded, features, positions, attends[0])
        return result

    def next_features(self, outputs: Tensor, module: int = 0) -> Tensor:
        """The outputs of a module, normalised or as they are."""
        return self._normalised(outputs, module) if self.reads_normalised else outputs

    def logits_of(self, outputs: Tensor, module: int = 0) -> Tensor:
        """`[..., V]`, by the target's LM head."""
        weight = self.tables.head
        assert weight is not None, "prepare refuses a target without"
        return F.linear(self._normalised(outputs, module).to(weight.dtype), weight, self.tables.head_bias)

    def _normalised(self, outputs: Tensor, module: int) -> Tensor:
        result: Tensor = self.mtp_layers[module].get_submodule("final_layernorm")(outputs)
        return result

    def table(self) -> Tensor:
        """The target's embedding."""
        assert self.tables.embedding is not None, "prepare refuses a target without"
        return self.tables.embedding

    def assisted(self) -> dict[str, object]:
        """That the model's own modules draft, and K."""
        return {"use_mtp": True, "num_assistant_tokens": self.num_draft_tokens}

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new, then draft: tokens, grades and of trees parents `[B, K]`, lengths `[B]`."""
        if self.last_read is None:
            return super().forward(context)
        read, known, caches = context.read, context.known, self._caches(context)
        own = self.features_of(self._taps(context))  # [T, H]
        again = self.last_read.window(context)  # positions [B, K - 1] and features [B, K - 1, H]
        width = again.positions.numel()
        positions = torch.cat([again.positions.flatten(), read.positions])  # [B (K - 1) + T]
        rows = torch.arange(known.shape[0], device=known.device).repeat_interleave(self.last_read.count)
        rows = torch.cat([rows, read.row_ids.clamp(max=known.shape[0] - 1)])
        features = torch.cat([again.features.flatten(0, 1), own])
        of_again, of_read = over_nodes(caches, again.positions, read.fed > 0), self._attends_to_read(context, caches)
        chosen = list[tuple[Tensor, Tensor]]()
        for depth, both in enumerate(zip(of_again, of_read, strict=True)):
            drafted = [tokens for tokens, _ in chosen]
            ahead = _tokens_at(context, rows, positions + depth + 1, drafted)
            attend = in_turn(both, (width, own.shape[0]))
            outputs = self.mtp_layers[depth](self._embedded(ahead), features, positions, attend)
            logits = self.logits_of(outputs[width + read.roots], depth)  # [B, V]
            chosen.append(self._choose_of(logits, 1, depth, context))
            features = self.next_features(outputs, depth)
        return self._chain_of(chosen, context, self.last_read.after(context, again, own))

    def rollout(self, features: Features) -> Iterator[Tensor]:
        """The logits of each draft `[B, S, V]`, as the head makes them when the drafts before are the text's tokens."""
        if self.last_read is None:
            yield from super().rollout(features)
            return
        tokens, own = features.tokens, self._features_of_target(features)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        for depth in range(self.num_draft_tokens):
            behind = tokens.roll(-depth - 1, 1)  # what is rolled over from the beginning is behind no token
            outputs = self.mtp_layers[depth](self._embedded(behind), own, positions, SelfFedAttention())
            yield self.logits_of(outputs, depth)
            own = self.next_features(outputs, depth)


class MTPModule(nn.Module):
    """A layer that reads a token and what was computed of the one before it, and the norm of what it gives."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.token_layernorm, self.hidden_layernorm, self.final_layernorm = (sizes.norm() for _ in range(3))
        self.input_proj = nn.Linear(2 * sizes.width, sizes.width, bias=False)
        self.layer = DecoderLayer(sizes)

    def forward(self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`[..., H]`, before the last norm, for embeddings and features `[..., H]` at `positions[...]`."""
        joined = torch.cat([self.token_layernorm(embedded), self.hidden_layernorm(features)], -1)  # [..., 2 H]
        result: Tensor = self.layer(self.input_proj(joined), positions, attend)
        return result


def _tokens_at(context: DraftContext, rows: Tensor, positions: Tensor, drafted: Sequence[Tensor]) -> Tensor:
    """The tokens of `rows[L]` at `positions[L]`, int64 `[L]`: known ones, and behind them the drafts `[B, 1]`."""
    history, known = context.history, context.known[rows]
    tokens = history[rows, positions.clamp(max=history.shape[1] - 1)]
    if not drafted:
        return tokens
    drafts = torch.cat(list(drafted), 1)[rows, (positions - known).clamp(0, len(drafted) - 1)]
    return torch.where(positions < known, tokens, drafts)
