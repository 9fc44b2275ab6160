"""Block drafters: all drafts in one pass over what the target computed (DFlash, 2602.06036; DSpark, 2607.05147)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.drafters.anchors import at_anchors, choose_anchors
from emssd_compile.drafters.block_config import BlockConfig, default_taps
from emssd_compile.drafters.block_layouts import DeepSpecBlock, SpeculatorsBlock, ZLabBlock
from emssd_compile.drafters.block_options import read_shape, read_threshold
from emssd_compile.drafters.decoder_layer import DecoderLayer
from emssd_compile.drafters.draft_vocabulary import over_all
from emssd_compile.drafters.drawing import likeliest, shaped
from emssd_compile.drafters.guesses import in_eighths
from emssd_compile.drafters.head import Features, Layout, Recipe
from emssd_compile.drafters.head_attention import BlockAttention, Cache
from emssd_compile.drafters.marginal_tree import MarginalTree
from emssd_compile.drafters.markov_head import MARKOV_HEADS, ConfidenceHead, MarkovHead
from emssd_compile.drafters.own_tables import OwnTables
from emssd_compile.errors import DrafterError
from emssd_compile.ops import pack_ancestors
from emssd_compile.step.drafting import Draft, DraftContext, Target, TargetSizes
from emssd_compile.step.pack import pack_each
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.tensor_spec import TensorSpec


class BlockDrafter(OwnTables):
    """Drafts a block of tokens in one pass of a small decoder, whose places see one another (2602.06036).

    Outputs of some of the target's layers, side by side, are projected and normalised to one vector c a token. In every
    layer of the head, what is known of the text is keys and values made of c: they are written once for each token, and
    nothing else is computed of it. A block is the root and mask tokens behind it; its places attend to the text before
    the root and to the whole block, in layers with a sliding window perhaps only to what is before them. What comes out
    at each place gives one draft. A window counts back from each place, as it does where such heads are served; where
    they are trained it begins with the root for all places of a block.

    With a Markov head (DSpark, 2607.05147), what the token before makes likely is added to the logits of a draft: then
    drafts are found one after the other, but without another pass. Without one, drafts can be put together to a tree.

    For rows that sample, temperature, top-k and top-p of the request shape what the head expects, and drafts are what
    is likely with the noise that the target draws with. The grade of a draft is its probability where it stands, in
    eighths.

    Args:
        config: sizes.
        num_draft_tokens: K, tokens of a chain; as many as a block gives, unless there is a `tree`. With fewer, blocks
            are shorter.
        tree: draft the likeliest of all paths (DDTree, 2604.12989), and how many; None for chains.
        confidence_threshold: leave out the first draft that the confidence head thinks is accepted with a smaller
            probability, and all behind it; None for no limit.
        taps: layers of the target whose outputs are read, where the checkpoint does not say which.

    Raises:
        OptionError: an option is out of range, nothing says which layers are read, or the head lacks what is asked for.
    """

    kind = "block"
    config_class: ClassVar[type[BlockConfig]] = BlockConfig
    layouts: ClassVar[tuple[Layout, ...]] = (SpeculatorsBlock(), ZLabBlock(), DeepSpecBlock())
    recipe = Recipe(learning_rate=6e-4, decay=math.exp(-1 / 4))
    num_grades = 8
    is_costly = remembers_features = True
    any_rows = True

    config: BlockConfig
    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None

    def __init__(
        self,
        config: BlockConfig,
        num_draft_tokens: int | None = None,
        *,
        tree: MarginalTree | None = None,
        confidence_threshold: float | None = None,
        taps: Sequence[int] | None = None,
    ) -> None:
        config = config.reading(taps)
        super().__init__(config)
        self.config, self.taps = config, tuple(config.taps or ())
        # A chain is a tree without branches: in a step of trees, a row may take K + 1 tokens at a time.
        self.num_draft_tokens, self.max_depth = read_shape(config, num_draft_tokens, tree)
        self.tree, self.confidence_threshold = tree, read_threshold(config, confidence_threshold)
        self.block = self.max_depth + (not config.sample_from_anchor)  # n, tokens that are read of each row
        sizes, width = config.layer, config.layer.width
        self.fc = nn.Linear(config.num_taps * config.hidden_size, width, bias=False)
        self.hidden_norm, self.norm = sizes.norm(), sizes.norm()
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(config.num_layers))
        self.make_tables(config, width)
        if config.mask_token is None:
            self.mask_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.markov_head, self.confidence_head = None, None
        if rank := config.markov_rank:
            kind = MARKOV_HEADS[config.markov_head]
            self.markov_head = kind(rank, width, config.vocabulary, config.draft_vocabulary)
        self.needs_teacher = config.has_confidence
        if config.has_confidence:
            self.confidence_head = ConfidenceHead(width + rank * config.confidence_reads_token)

    @classmethod
    def for_target(cls, target: TargetSizes, **sizes: Any) -> Self:
        """A head to be trained; it reads the layers that DFlash does, unless `taps` are among the sizes.

        Raises:
            OptionError: as for `DraftHead`.
        """
        taps = default_taps(target.num_layers, 5)
        return super().for_target(target, **{"taps": tuple(dict.fromkeys(taps)), **sizes})

    def check(self, sizes: TargetSizes) -> None:
        """As for `DraftHead`. Raises DrafterError if rows are longer than its layers were made for, too."""
        super().check(sizes)
        self.config.layer.check_reach("BlockDrafter", sizes.capacity)

    def prepare(self, target: Target) -> None:
        """See the target.

        Raises:
            DrafterError: as for `DraftHead`, or the embedding has no such mask token.
        """
        super().prepare(target)
        mask, rows = self.config.mask_token, len(self.table())
        if mask is not None and mask >= rows:
            raise DrafterError(
                f"the mask token of the BlockDrafter is {mask}, and the embedding has {rows} rows; use the head that "
                "was trained for this target"
            )

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """KV caches of the layers, `[B, slots, Hkv, D]`: a block may reach past the text's end."""
        layer = self.config.layer
        shape = (sizes.rows, sizes.capacity + self.block, layer.kv_heads, layer.head_size)
        spec = TensorSpec(shape, next(self.parameters()).dtype, kept="forever", in_place=True)
        return {f"{kind}_cache_{index}": spec for index in range(len(self.layers)) for kind in "kv"}

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new, then draft: tokens, grades and parents `[B, K]`, lengths `[B]`."""
        state = context.state
        caches = [Cache(state[f"k_cache_{index}"], state[f"v_cache_{index}"]) for index in range(len(self.layers))]
        self._read(context, caches)
        root = context.history.gather(1, (context.known - 1).clamp(min=0)[:, None]).squeeze(1)  # [B]
        hidden = self._run_block(root, context, caches)  # [B, D, H]
        max_drafts = torch.where(context.can_draft, context.max_drafts, 0).clamp(max=hidden.shape[1])  # [B]
        if self.tree is None:
            return self._draft_chain(hidden, root, max_drafts, context)
        return self._draft_tree(self.tree, hidden, max_drafts, context)

    def features_of(self, taps: Mapping[Any, Tensor]) -> Tensor:
        """Of each token c, `[..., H]`, of what the target computed of it, `[..., Ht]` each."""
        outputs = [taps[tap].to(self.fc.weight.dtype) for tap in self.taps]
        features: Tensor = self.hidden_norm(self.fc(torch.cat(outputs, -1)))
        return features

    def _read(self, context: DraftContext, caches: Sequence[Cache]) -> None:
        """Write keys and values of all tokens that are new."""
        read = context.read
        features = self.features_of({tap: context.taps[tap][context.source] for tap in self.taps})  # [T, H]
        for layer, cache in zip(self._decoder(), caches, strict=True):
            k, v = layer.self_attn.keys_and_values(features, read.positions)  # [T, Hkv, D] each
            cache.append(k, v, read)

    def _run_block(self, root: Tensor, context: DraftContext, caches: Sequence[Cache]) -> Tensor:
        """What the head says where it drafts, `[B, D, H]`; the block's keys and values are forgotten."""
        going = context.can_draft & (context.max_drafts > 0)  # [B]
        lengths = torch.where(going, context.known - 1, 0)  # [B]
        places = torch.arange(self.block, device=root.device)  # [n]
        which = torch.arange(root.shape[0] * self.block, device=root.device).view(root.shape[0], -1)  # [B, n]
        causal, order = pack_each(which, lengths[:, None] + places, going)
        everyone = torch.ones(which.numel(), self.block, dtype=torch.bool, device=root.device)  # [T, n]
        both_ways = replace(causal, ancestors=pack_ancestors(everyone))
        x = self._blank(root).flatten(0, 1)[causal.input_ids]  # [T, H]
        for layer, cache, (window, is_causal) in zip(self.layers, caches, self._sights(), strict=True):
            packed = causal if is_causal else both_ways
            x = layer(x, causal.positions, partial(cache.attend, packed=packed, lengths=lengths, window=window))
        return self._drafting(self.norm(x)[order])

    def _draft_chain(self, hidden: Tensor, root: Tensor, max_drafts: Tensor, context: DraftContext) -> Draft:
        """The likeliest token of each place, behind those found before."""
        logits = self.head_logits(hidden).float()  # [B, D, Vd]
        path, log_q = [root[:, None]], list[Tensor]()  # [B, 1] each
        state: Tensor | None = None
        for depth in range(hidden.shape[1]):
            said, state = self._informed(logits[:, depth], hidden[:, depth], path[-1].squeeze(1), state)
            found = likeliest(shaped(said, context), 1, depth, context, self.ids())
            path.append(found[0])
            log_q.append(found[1])
        tokens = torch.cat(path, 1)  # [B, K + 1]
        lengths = self._trusted(self._with_token(hidden, tokens[:, :-1]), max_drafts)
        parents = torch.arange(hidden.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
        return Draft(tokens[:, 1:], lengths, grades=in_eighths(torch.cat(log_q, 1).exp()), parents=parents)

    def _draft_tree(self, tree: MarginalTree, hidden: Tensor, max_drafts: Tensor, context: DraftContext) -> Draft:
        """The likeliest paths of the likeliest tokens of each place."""
        logits = self.head_logits(hidden).float()  # [B, D, Vd]
        found = [
            likeliest(shaped(each, context), tree.width, depth, context, self.ids())
            for depth, each in enumerate(logits.unbind(1))
        ]  # [B, width] each
        tokens, log_q = (torch.stack(each, 1) for each in zip(*found, strict=True))  # [B, D, width]
        kept = tree.grow(tokens, log_q.clamp(max=0), self._trusted(hidden, max_drafts))
        return Draft(kept.tokens, kept.lengths, grades=in_eighths(kept.probabilities), parents=kept.parents)

    def _informed(
        self, logits: Tensor, hidden: Tensor, previous: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[..., Vd]` with what the token before makes likely, and what the Markov head then remembers.

        Args:
            logits: float32 `[..., Vd]`, of a place by itself.
            hidden: `[..., H]`, there.
            previous: int64 `[...]`, the token before.
            state: what is remembered of the places before; None at the first.
        """
        if self.markov_head is None:
            return logits, None
        row = self.markov_head.row(previous)  # [..., r]
        bias, state = self.markov_head(row, hidden, torch.zeros_like(row) if state is None else state)
        return logits + bias.float(), state

    def _with_token(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """What the confidence head reads of places, with the tokens before them if it looks at those."""
        if self.markov_head is None or not self.config.confidence_reads_token:
            return hidden
        return torch.cat([hidden, self.markov_head.row(previous)], -1)

    def _trusted(self, read: Tensor, max_drafts: Tensor) -> Tensor:
        """The most drafts on a path of each row, `[B]`; `read[B, D, _]` is what the confidence head reads of places."""
        if self.confidence_head is None or self.confidence_threshold is None:
            return max_drafts
        is_sure = self.confidence_head(read) >= self.confidence_threshold  # [B, D]
        return torch.minimum(max_drafts, is_sure.to(max_drafts.dtype).cumprod(1).sum(1))

    def _decoder(self) -> list[DecoderLayer]:
        """The layers."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def _blank(self, roots: Tensor) -> Tensor:
        """What is read of blocks: the roots `[...]` and mask tokens, `[..., n, H]`."""
        table, dtype = self.table(), self.fc.weight.dtype
        first = F.embedding(roots.clamp(max=len(table) - 1), table).to(dtype)[..., None, :]  # [..., 1, H]
        mask = self.mask_embedding if self.config.mask_token is None else table[self.config.mask_token].to(dtype)
        return torch.cat([first, mask.expand(*roots.shape, self.block - 1, -1)], -2)

    def _sights(self) -> list[tuple[int, bool]]:
        """Of each layer, its window (0 for none), and whether a place sees only those before it of its block."""
        config = self.config
        limited = (config.sliding_window, config.sliding_is_causal)
        return [limited if index in config.sliding_layers else (0, False) for index in range(config.num_layers)]

    def _drafting(self, x: Tensor) -> Tensor:
        """Those places of blocks `[..., n, H]` that give drafts, `[..., D, H]`."""
        return x[..., 1 - self.config.sample_from_anchor :, :]

    def rollout(self, features: Features) -> Iterator[Tensor]:
        """The logits of each draft `[B, S, V]`, when the drafts before are the text's tokens.

        A token that the head cannot draft has -inf; so have all, where no block is made: behind all but `MOST_ANCHORS`
        places of a window.
        """
        return (logits for logits, _ in self.graded_rollout(features))

    def graded_rollout(self, features: Features) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same, and what the confidence head says of each draft, if there is one."""
        tokens, context = features.tokens, self.features_of(features.taps)  # [B, S], [B, S, H]
        anchors = choose_anchors(tokens, at_random=self.training)  # [A], the last tokens before blocks
        text = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # [B, S]
        x = self._blank(tokens.roll(-1, 1)[:, anchors])  # [B, A, n, H]
        positions = anchors[:, None] + 1 + torch.arange(self.block, device=tokens.device)  # [A, n]
        for layer, sight in zip(self._decoder(), self._sights(), strict=True):
            attend = BlockAttention(*layer.self_attn.keys_and_values(context, text), anchors, *sight)
            x = layer(x, positions.expand(x.shape[:-1]), attend)
        hidden = self._drafting(self.norm(x))  # [B, A, D, H]
        state: Tensor | None = None
        for depth, each in enumerate(hidden.unbind(2)):
            previous = tokens.roll(-1 - depth, 1)[:, anchors]  # [B, A]
            logits, state = self._informed(self.head_logits(each).float(), each, previous, state)
            if self.config.draft_vocabulary < self.config.vocabulary:
                logits = over_all(logits, self.ids(), self.config.vocabulary)
            logits = at_anchors(anchors, logits, tokens, -torch.inf)
            confidence: Tensor | None = None
            if self.confidence_head is not None:
                log_odds = self.confidence_head.log_odds(self._with_token(each, previous))  # [B, A]
                confidence = at_anchors(anchors, log_odds, tokens, 0)
            yield logits, confidence
