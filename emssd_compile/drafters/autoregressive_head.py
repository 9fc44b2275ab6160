"""Draft heads with layers and caches of their own: they begin with the target's features and go on with their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from emssd_compile.drafters.decoder_layer import Attend, LayerSizes
from emssd_compile.drafters.draft_vocabulary import over_all
from emssd_compile.drafters.drawing import likeliest, shaped
from emssd_compile.drafters.dynamic_tree import Beam, DynamicTree, GrowingTree
from emssd_compile.drafters.guesses import in_eighths
from emssd_compile.drafters.head import DraftHead, Features, HeadSizes
from emssd_compile.drafters.head_attention import Cache, NodeAttention, SelfFedAttention
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer
from emssd_compile.ops import pack_ancestors
from emssd_compile.step.drafting import Draft, DraftContext, TargetSizes
from emssd_compile.step.pack import Packed, pack_each
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.tensor_spec import TensorSpec


class AutoregressiveHead(DraftHead):
    """A small decoder over pairs of a token and what was computed of the token before it (EAGLE, MTP).

    The pair at position p is the token at p + 1 and the target's features of the one at p: so the newest pair has the
    root token, and gives the first draft. Behind it the drafts take the place of tokens, and the head's own output that
    of features. In each step the head first reads the tokens whose KV the target has committed, of all rows packed
    together; its own KV of the pair at p lies in slot p. Drafts are read in the slots behind, and forgotten.

    The grade of a draft is the probability that the head gives it where it stands, in eighths. For rows that sample,
    temperature, top-k and top-p of the request shape it, and drafts are what is likely with the noise that the target
    draws with (`randomness.gumbels`): then both mostly draw the same.

    A subclass says what features are, what the layers do with a pair, and what logits come out.

    Attributes:
        spare_slots: of each cache, behind those of a row's positions.

    Args:
        config: of the head.
        sizes: of its layers.
        num_layers: how many have a cache.
        num_ids: L, tokens that can be drafted.
        num_draft_tokens: K, tokens of a chain; None for what is said by `default` or the `tree`.
        tree: draft trees, and how large they grow; None for chains.
        default: K, if nothing is said.

    Raises:
        OptionError: K is out of range, both a chain and a tree are asked for, or a tree puts more tokens behind a node
            than can be drafted.
    """

    num_grades = 8
    is_costly = remembers_features = True
    any_rows = True

    def __init__(
        self,
        config: HeadSizes,
        sizes: LayerSizes,
        num_layers: int,
        num_ids: int,
        num_draft_tokens: int | None,
        tree: DynamicTree | None,
        default: int = 4,
    ) -> None:
        super().__init__(config)
        name = type(self).__name__
        if tree is not None and not isinstance(tree, DynamicTree):
            raise OptionError(f"{name} tree={tree!r} is no DynamicTree; pass tree=DynamicTree(nodes=16)")
        if tree is not None and num_draft_tokens is not None:
            raise OptionError(
                f"{name} num_draft_tokens={num_draft_tokens!r} is for chains, and the tree says how many drafts there "
                "are; pass one of them"
            )
        if tree is not None and tree.width > num_ids:
            raise OptionError(
                f"{name} tree={tree} puts {tree.width} tokens behind a node, and {num_ids} can be drafted"
            )
        if tree is None:
            chosen = default if num_draft_tokens is None else num_draft_tokens
            self.num_draft_tokens = integer(f"{name} num_draft_tokens", chosen, least=1)
        else:
            self.num_draft_tokens, self.max_depth = tree.nodes, tree.depth
        self.tree, self.sizes, self.num_layers = tree, sizes, num_layers
        self.spare_slots = tree.fed if tree else 0

    def check(self, sizes: TargetSizes) -> None:
        """As for `DraftHead`. Raises DrafterError if rows are longer than its layers were made for, too."""
        super().check(sizes)
        self.sizes.check_reach(type(self).__name__, sizes.capacity)

    def features_of(self, taps: Mapping[str | int, Tensor]) -> Tensor:
        """The target's features of each token, `[..., H]`, from what it computed of them, `[..., Ht]` each."""
        raise NotImplementedError

    def run(self, embedded: Tensor, features: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """The layers' output `[..., H]` for pairs of embeddings and features `[..., H]` at `positions[...]`."""
        raise NotImplementedError

    def next_features(self, outputs: Tensor) -> Tensor:
        """The head's own features `[..., H]`, of what `run` gave."""
        raise NotImplementedError

    def next_pair(self, tokens: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and features, `[..., H]` each, of drafts `[...]` and the outputs `[..., H]` that made them."""
        return self._embedded(tokens), self.next_features(outputs)

    def logits_of(self, outputs: Tensor) -> Tensor:
        """`[..., L]`, one for each of `ids`, of what `run` gave."""
        raise NotImplementedError

    def table(self) -> Tensor:
        """The embedding that tokens are looked up in, `[V, H]`."""
        raise NotImplementedError

    def ids(self) -> Tensor:
        """int64 `[L]`, ascending: the tokens that can be drafted."""
        return torch.arange(self.config.vocabulary, device=next(self.parameters()).device)

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """KV caches of the layers, `[B, slots, Hkv, D]`: drafts may take more slots than there are positions."""
        shape = (sizes.rows, sizes.capacity + self.spare_slots, self.sizes.kv_heads, self.sizes.head_size)
        spec = TensorSpec(shape, next(self.parameters()).dtype, kept="forever", in_place=True)
        return {f"{kind}_cache_{layer}": spec for layer in range(self.num_layers) for kind in "kv"}

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new, then draft: tokens, grades and of trees parents `[B, K]`, lengths `[B]`."""
        caches = self._caches(context)
        outputs = self._read(context, caches)  # [B, H]
        if self.tree is None:
            return self._draft_chain(outputs, context, caches)
        return self._draft_tree(self.tree, outputs, context, caches)

    def _read(self, context: DraftContext, caches: Sequence[Cache]) -> Tensor:
        """Read the pairs at all positions that are new; the outputs at each row's newest, `[B, H]`."""
        read = context.read
        embedded = self._embedded(self._following(context))  # [T, H]
        features = self.features_of(self._taps(context))  # [T, H]
        return self.run(embedded, features, read.positions, self._attends_to_read(context, caches))[read.roots]

    def _caches(self, context: DraftContext) -> list[Cache]:
        """One of each layer."""
        state = context.state
        return [Cache(state[f"k_cache_{layer}"], state[f"v_cache_{layer}"]) for layer in range(self.num_layers)]

    def _following(self, context: DraftContext) -> Tensor:
        """The tokens behind those read, int64 `[T]`."""
        read, history = context.read, context.history
        rows = read.row_ids.clamp(max=history.shape[0] - 1)  # [T]
        return history[rows, (read.positions + 1).clamp(max=history.shape[1] - 1)]

    def _taps(self, context: DraftContext) -> dict[str | int, Tensor]:
        """What the target computed of the tokens read, `[T, Ht]` each."""
        return {name: tap[context.source] for name, tap in context.taps.items()}

    def _attends_to_read(self, context: DraftContext, caches: Sequence[Cache]) -> list[Attend]:
        """Of each layer: the tokens read attend to one another, and to those of their rows that were read before."""
        read = context.read
        lengths = first_positions(read)

        def over(cache: Cache) -> Attend:
            return lambda q, k, v: cache.attend(q, k, v, read, lengths)

        return [over(cache) for cache in caches]

    def _draft_chain(self, outputs: Tensor, context: DraftContext, caches: Sequence[Cache]) -> Draft:
        """Read one draft of each row at a time, in the slot behind the one before it."""
        outputs, chosen = outputs[:, None], list[tuple[Tensor, Tensor]]()  # [B, 1, H]
        for depth in range(self.num_draft_tokens):
            chosen.append(self._choose(outputs, 1, depth, context))
            if depth + 1 < self.num_draft_tokens:
                going = depth + 1 < context.max_drafts
                lengths = torch.where(going, context.known - 1 + depth, 0)  # [B]
                positions = lengths[:, None]
                packed, order = pack_each(torch.arange(going.shape[0], device=going.device)[:, None], positions, going)
                attends = [NodeAttention(cache, packed, order, lengths) for cache in caches]
                outputs = self.run(*self.next_pair(chosen[-1][0], outputs), positions, attends)
        return self._chain_of(chosen, context)

    def _chain_of(
        self, chosen: Sequence[tuple[Tensor, Tensor]], context: DraftContext, state: dict[str, Tensor] | None = None
    ) -> Draft:
        """K drafts behind one another, of their tokens and log-probabilities, `[B, 1]` each."""
        tokens, log_q = (torch.cat(each, 1) for each in zip(*chosen, strict=True))
        return Draft(
            tokens,
            context.max_drafts.clamp(max=self.num_draft_tokens),
            state or {},
            in_eighths(log_q.exp()),
            None if self.max_depth is None else torch.arange(len(chosen), device=tokens.device).expand_as(tokens),
        )

    def _draft_tree(self, tree: DynamicTree, outputs: Tensor, context: DraftContext, caches: Sequence[Cache]) -> Draft:
        """Read the nodes with most promise of each depth but the last, and keep the best of all drafts."""
        outputs = outputs[:, None]  # [B, 1, H]
        growing = GrowingTree(tree, context.max_drafts, Beam.of_roots(context.known, tree.fed))
        held: list[tuple[Tensor, ...]] = [() for _ in caches]
        words: list[Tensor] = []  # [B, width, words of bits] of each depth
        for depth in range(tree.depth):
            growing.grow(*self._choose(outputs, tree.width, depth, context))
            if depth + 1 == tree.depth:
                break
            beam, going = growing.beam, depth + 1 < context.max_drafts
            words.append(pack_ancestors(beam.sees.flatten(0, 1)).unflatten(0, beam.tokens.shape))
            lengths = torch.where(going, context.known - 1, 0)  # [B]
            packed, order = self._pack_nodes(torch.cat(words, 1), lengths, going, tree.width)
            attends = [
                NodeAttention(cache, packed, order, lengths, before) for cache, before in zip(caches, held, strict=True)
            ]
            above = self.next_features(outputs)  # [B, n, H]
            above = above.gather(1, beam.origins[:, :, None].expand(-1, -1, above.shape[2]))  # [B, width, H]
            positions = (lengths + depth)[:, None].expand_as(beam.tokens)
            outputs = self.run(self._embedded(beam.tokens), above, positions, attends)
            held = [attend.before for attend in attends]
        kept = growing.kept()
        return Draft(kept.tokens, kept.lengths, grades=in_eighths(kept.probabilities), parents=kept.parents)

    def _pack_nodes(self, words: Tensor, lengths: Tensor, going: Tensor, width: int) -> tuple[Packed, Tensor]:
        """Pack the nodes read so far, in slots behind one another; also where in T each lies, `[B, n]`.

        Args:
            words: int32 `[B, n, words]`, whom each node sees.
            lengths: int64 `[B]`, slots before the first node.
            going: bool `[B]`.
            width: nodes of each depth.
        """
        rows, nodes = words.shape[:2]
        number = torch.arange(nodes, device=words.device)  # [n]
        which = torch.arange(rows * nodes, device=words.device).view(rows, nodes)
        packed, order = pack_each(which, lengths[:, None] + number // width, going)
        source = packed.input_ids  # [T]
        slots = (lengths[:, None] + number).flatten()[source]
        return replace(packed, slots=slots, ancestors=words.flatten(0, 1)[source]), order

    def _choose(self, outputs: Tensor, count: int, depth: int, context: DraftContext) -> tuple[Tensor, Tensor]:
        """The best `count` tokens behind nodes of a depth, `[B * n, count]`, and their log-probabilities.

        Args:
            outputs: of the nodes, `[B, n, H]`.
            count: of drafts behind each.
            depth: of the nodes.
            context: says for whom drafts are drawn.
        """
        return self._choose_of(self.logits_of(outputs.flatten(0, 1)), count, depth, context)

    def _choose_of(self, logits: Tensor, count: int, depth: int, context: DraftContext) -> tuple[Tensor, Tensor]:
        """The same, of the nodes' logits `[B * n, L]`."""
        tokens, log_q = likeliest(shaped(logits.float(), context), count, depth, context, self.ids())
        return tokens, log_q.clamp(max=0)  # which rounding may exceed

    def _embedded(self, tokens: Tensor) -> Tensor:
        """`[..., H]`; an id past the table is read as its last one."""
        table = self.table()
        return F.embedding(tokens.clamp(max=len(table) - 1), table).to(next(self.parameters()).dtype)

    def rollout(self, features: Features) -> Iterator[Tensor]:
        """The logits of each draft `[B, S, V]`, as the head makes them when the drafts before are the text's tokens.

        A token that the head cannot draft has -inf.
        """
        tokens, depth = features.tokens, self.max_depth or self.num_draft_tokens
        ids, vocabulary = self.ids(), self.config.vocabulary
        embedded, own = self._embedded(tokens.roll(-1, 1)), self._features_of_target(features)
        attends = [SelfFedAttention() for _ in range(self.num_layers)]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        for index in range(depth):
            outputs = self.run(embedded, own, positions + index, attends)
            logits = self.logits_of(outputs)
            yield logits if len(ids) == vocabulary else over_all(logits, ids, vocabulary)
            behind = tokens.roll(-index - 2, 1)  # what is rolled over from the beginning is behind no token
            embedded, own = self.next_pair(behind, outputs)

    def _features_of_target(self, features: Features) -> Tensor:
        """Those of whole texts, `[B, S, H]`."""
        taps: dict[str | int, Tensor] = {"hidden": features.hidden}
        return self.features_of(taps | dict(features.taps.items()))


def first_positions(read: Packed) -> Tensor:
    """Of the first token of each row, int64 `[B]`; 0 for a row without any."""
    first = read.offsets[:-1].clamp(max=read.positions.shape[0] - 1)  # [B]
    return torch.where(read.fed > 0, read.positions[first], 0)
