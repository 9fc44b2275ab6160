"""Medusa: heads that each predict another of the next tokens, all from the same hidden state (2401.10774)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.drafters.draft_vocabulary import most_frequent, over_all
from emssd_compile.drafters.drawing import over
from emssd_compile.drafters.guesses import guess, in_eighths
from emssd_compile.drafters.head import DraftHead, Features, Recipe
from emssd_compile.drafters.medusa_config import MedusaConfig
from emssd_compile.drafters.medusa_layouts import FasterDecodingLayout, VllmLayout
from emssd_compile.drafters.sparse_tree import SparseTree, calibrated_tree
from emssd_compile.drafters.speculators import InSpeculators
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.drafting import Draft, DraftContext, TargetSizes, TokenTables

DEFAULT_NODES, DEFAULT_RANKS = 31, 10
"""With its root such a tree fills one word of 32 bits; the published trees draft the ten likeliest tokens, too."""


class Medusa(DraftHead):
    """Head k of D predicts the k-th token behind the root, without knowing those between (2401.10774).

    h is what the target's LM head read where it predicted the root token. Each block of a head adds
    SiLU(W1 h + b) to h, and an LM head W2 makes logits of that. All nodes of the tree at depth k are of the likeliest
    tokens of head k, each the token of its rank: nothing is computed for each node. For rows that sample, the likeliest
    are those with the largest log q + g, where q is shaped as what the target draws from, and g is the noise with which
    it draws the token of that place.

    The grade of a draft is the probability that its head gives it, in eighths.

    Args:
        config: its sizes.
        tree: what to draft: paths of ranks, such as `((0,), (1,), (0, 0))`, or how many children the nodes of each
            depth have, such as `(4, 2, 2)`. By default that of the config, which training chooses by what it measures
            (see `calibrate`), or else 31 nodes that are the best for accuracies as published.

    Raises:
        OptionError: the tree makes no sense, or is deeper than there are heads.
    """

    kind = "medusa"
    config_class: ClassVar[type[MedusaConfig]] = MedusaConfig
    layouts = (VllmLayout(), FasterDecodingLayout(), InSpeculators("medusa", VllmLayout(), FasterDecodingLayout()))
    recipe = Recipe(learning_rate=1e-3, decay=0.8)
    is_costly = True
    any_rows = True
    num_grades = 8
    drafts_ranks = True
    config: MedusaConfig

    def __init__(self, config: MedusaConfig, *, tree: Iterable[Any] | None = None) -> None:
        super().__init__(config)
        self._draft(_tree(config, tree))
        self.borrows = () if config.num_lm_heads else ("head",)
        hidden, own = config.hidden_size, config.draft_vocabulary or config.vocabulary
        self.blocks = nn.ModuleList(_Blocks(hidden, config.num_layers, config.bias) for _ in range(config.num_heads))
        self.lm_heads = nn.ModuleList(nn.Linear(hidden, own, bias=False) for _ in range(config.num_lm_heads or 0))
        if config.draft_vocabulary:
            self.register_buffer("token_map", torch.arange(own))
        self.token_map: Tensor
        self.parents: Tensor
        self.depths: Tensor
        self.places: Tensor

    def _draft(self, tree: SparseTree) -> None:
        """Take a tree; the place of a node is where its token lies among the likeliest ones of all depths."""
        self.tree = tree
        self.num_draft_tokens, self.max_depth = tree.num_nodes, tree.depth
        firsts = [sum(tree.widths[: depth - 1]) for depth in tree.depths]
        places = [first + rank for first, rank in zip(firsts, tree.ranks, strict=True)]
        for name, numbers in (("parents", tree.parents), ("depths", tree.depths), ("places", places)):
            self.register_buffer(name, torch.tensor(numbers), persistent=False)

    @property
    def open_ranks(self) -> int:
        """0 if the config says which tree to draft."""
        return 0 if self.config.tree is not None else _ranks(self.config)

    def calibrate(self, accuracies: Tensor, num_nodes: int | None = None) -> None:
        """Draft the tree that is the best for measured accuracies, and have it in the config.

        Args:
            accuracies: `[D, ranks]`, how often head k is right with its token of that rank, 0 the likeliest.
            num_nodes: of the tree; 31 by default. With its root such a tree fills one word of 32 bits.

        Raises:
            OptionError: as `calibrated_tree`.
        """
        device = self.parents.device
        self._draft(calibrated_tree(accuracies, DEFAULT_NODES if num_nodes is None else num_nodes))
        self.config = replace(self.config, tree=self.tree.paths)
        self.to(device=device)

    def begin(self, counts: Tensor) -> None:
        """Each of the heads predicts what the target does, until it has learned; of fewer tokens, those said most."""
        if self.config.draft_vocabulary:
            self.token_map.copy_(most_frequent(counts, self.config.draft_vocabulary))
        self.start_from(self.tables)

    @torch.no_grad()
    def start_from(self, tables: TokenTables) -> None:
        """Make W1 and b 0, and W2 the target's LM head, if it is there."""
        for parameter in self.blocks.parameters():
            parameter.zero_()
        if tables.head is not None:
            known = slice(None) if self.config.draft_vocabulary is None else self.token_map
            for lm_head in self.lm_heads.parameters():
                lm_head.copy_(tables.head[known])

    def check(self, sizes: TargetSizes) -> None:
        """See `DraftHead`.

        Raises:
            DrafterError: as for `DraftHead`, or the tree wants more tokens of a depth than there are.
        """
        super().check(sizes)
        most = min(self.config.draft_vocabulary or self.config.vocabulary, sizes.vocabulary)
        if (wanted := max(self.tree.widths)) > most:
            raise DrafterError(
                f"the tree of the Medusa has rank {wanted - 1}, and its heads know {most} tokens: draft lower ranks"
            )

    def forward(self, context: DraftContext) -> Draft:
        """Tokens `[B, K]`, lengths `[B]`, grades and parents `[B, K]`."""
        logits = self._logits(context.hidden, self.tree.depth)  # [B, V] each
        guesses = [
            guess(over(one, context.vocabulary), width, depth, 0, context)
            for depth, (one, width) in enumerate(zip(logits, self.tree.widths, strict=True))
        ]
        tokens = torch.cat([one.tokens for one in guesses], 1)[:, self.places]  # [B, K]
        probabilities = torch.cat([one.probabilities for one in guesses], 1)[:, self.places]  # [B, K]
        max_drafts = torch.where(context.can_draft, context.max_drafts, 0)  # [B]
        lengths = (self.depths <= max_drafts[:, None]).sum(1)  # [B]
        return Draft(tokens, lengths, grades=in_eighths(probabilities), parents=self.parents.expand_as(tokens))

    def rollout(self, features: Features) -> Iterator[Tensor]:
        """Logits of each head, `[B, S, V]`: -inf for tokens that it does not know."""
        yield from self._logits(features.hidden, self.config.num_heads)

    def _logits(self, hidden: Tensor, count: int) -> list[Tensor]:
        """Those of the first heads, `[..., V]` each, in the dtype of `hidden[..., H]`."""
        states = [self.blocks[k](hidden) for k in range(count)]  # [..., H] each
        if self.config.num_lm_heads == self.config.num_heads:
            found = [lm_head(state) for lm_head, state in zip(self.lm_heads, states, strict=False)]
        else:  # the weights of an LM head are read once for all
            found = [*self._shared(torch.stack(states))]
        return [self._of_target(one) for one in found]

    def _shared(self, states: Tensor) -> Tensor:
        """Logits of the LM head that all heads have in common, `[..., V]`: one of their own, or the target's."""
        if self.lm_heads:
            logits: Tensor = self.lm_heads[0](states)
            return logits
        assert self.tables.head is not None, "prepare comes first"
        return F.linear(states, self.tables.head, self.tables.head_bias)

    def _of_target(self, logits: Tensor) -> Tensor:
        """Logits of all tokens, `[..., V]`, from those of the tokens that the head knows."""
        if self.config.draft_vocabulary is None:
            return logits
        return over_all(logits, self.token_map, self.config.vocabulary)


class _Blocks(nn.Module):
    """Residual blocks: each adds SiLU(W1 h + b) to h, `[..., H]`."""

    def __init__(self, hidden_size: int, num_layers: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size, bias) for _ in range(num_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """The same shape."""
        for layer in self.layers:
            hidden = hidden + F.silu(layer(hidden))
        return hidden


def _tree(config: MedusaConfig, option: Iterable[Any] | None) -> SparseTree:
    """The tree to draft. Raises OptionError."""
    chosen = config.tree if option is None else option
    if chosen is None:
        return _default_tree(config)
    tree = SparseTree.of("Medusa tree", chosen)
    if tree.depth > config.num_heads:
        raise OptionError(f"Medusa tree is {tree.depth} deep, and there are {config.num_heads} heads; draft less deep")
    return tree


def _default_tree(config: MedusaConfig) -> SparseTree:
    """The best one for the accuracies of a good head, as far as they are known.

    Head k is assumed to be right in 0.6 * 0.65^(k - 1) of texts, and its token of rank r in 1 / (1 + r)^2 of that.
    Of the first 31 nodes published for Vicuna-7B, 26 are the same.
    """
    accuracies = [[0.6 * 0.65**k / (1 + rank) ** 2 for rank in range(_ranks(config))] for k in range(config.num_heads)]
    return calibrated_tree(accuracies, DEFAULT_NODES)


def _ranks(config: MedusaConfig) -> int:
    return min(DEFAULT_RANKS, config.draft_vocabulary or config.vocabulary)
