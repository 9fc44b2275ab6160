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
from emssd_compile.step.drafting import Draft, DraftContext
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
    must_run = True

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

    def features_of(self, taps: Mapping[str | int, Tensor]) -> Tensor:
        """The target's features of each token, `[..., H]`, from what it computed of them, `[..., Ht]` each."""
        raise NotImplementedError

    def run(self, embedded: Tensor, features: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """The layers' output `[..., H]` for pairs of embeddings and features `[..., H]` at `positions[...]`."""
        raise NotImplementedError

    def next_features(self, outputs: Tensor) -> Tensor:
        """The head's own features `[..., H]`, of what `run` gave."""
        raise NotImplementedError

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
        """KV caches of the layers, `[B, slots, Hkv, D]`: of a tree, nodes may take more slots than positions."""
        slots = sizes.capacity + (self.tree.fed if self.tree else 0)
        shape = (sizes.rows, slots, self.sizes.kv_heads, self.sizes.head_size)
        spec = TensorSpec(shape, next(self.parameters()).dtype, kept="forever", in_place=True)
        return {f"{kind}_cache_{layer}": spec for layer in range(self.num_layers) for kind in "kv"}

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new, then draft: tokens, grades and of trees parents `[B, K]`, lengths `[B]`."""
        state = context.state
        caches = [Cache(state[f"k_cache_{layer}"], state[f"v_cache_{layer}"]) for layer in range(self.num_layers)]
        outputs = self._read(context, caches)  # [B, H]
        if self.tree is None:
            return self._draft_chain(outputs, context, caches)
        return self._draft_tree(self.tree, outputs, context, caches)

    def _read(self, context: DraftContext, caches: Sequence[Cache]) -> Tensor:
        """Read the pairs at all positions that are new; the outputs at each row's newest, `[B, H]`."""
        read, history = context.read, context.history
        rows = read.row_ids.clamp(max=len(history) - 1)  # [T]
        following = history[rows, (read.positions + 1).clamp(max=history.shape[1] - 1)]  # [T]
        features = self.features_of({name: tap[context.source] for name, tap in context.taps.items()})  # [T, H]
        first = read.offsets[:-1].clamp(max=rows.shape[0] - 1)  # [B]
        lengths = torch.where(read.fed > 0, read.positions[first], 0)  # [B]

        def over(cache: Cache) -> Attend:
            return lambda q, k, v: cache.attend(q, k, v, read, lengths)

        outputs = self.run(self._embedded(following), features, read.positions, [over(cache) for cache in caches])
        return outputs[read.roots]

    def _draft_chain(self, outputs: Tensor, context: DraftContext, caches: Sequence[Cache]) -> Draft:
        """Read one draft of each row at a time, in the slot behind the one before it."""
        outputs, tokens, probabilities = outputs[:, None], [], []  # [B, 1, H]
        for depth in range(self.num_draft_tokens):
            drafts, log_q = self._choose(outputs, 1, depth, context)  # [B, 1]
            tokens.append(drafts)
            probabilities.append(log_q.exp())
            if depth + 1 < self.num_draft_tokens:
                going = depth + 1 < context.max_drafts
                lengths = torch.where(going, context.known - 1 + depth, 0)  # [B]
                positions = lengths[:, None]
                packed, order = pack_each(torch.arange(len(going), device=going.device)[:, None], positions, going)
                attends = [NodeAttention(cache, packed, order, lengths) for cache in caches]
                outputs = self.run(self._embedded(drafts), self.next_features(outputs), positions, attends)
        return Draft(
            torch.cat(tokens, 1),
            context.max_drafts.clamp(max=self.num_draft_tokens),
            grades=in_eighths(torch.cat(probabilities, 1)),
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
        logits = shaped(self.logits_of(outputs.flatten(0, 1)).float(), context)  # [B * n, L]
        tokens, log_q = likeliest(logits, count, depth, context, self.ids())
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
        taps: dict[str | int, Tensor] = {"hidden": features.hidden}
        own = self.features_of(taps | dict(features.taps.items()))
        attends = [SelfFedAttention() for _ in range(self.num_layers)]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        for index in range(depth):
            behind = tokens.roll(-index - 1, 1)  # what is rolled over from the beginning is behind no token
            outputs = self.run(self._embedded(behind), own, positions + index, attends)
            logits = self.logits_of(outputs)
            yield logits if len(ids) == vocabulary else over_all(logits, ids, vocabulary)
            own = self.next_features(outputs)
