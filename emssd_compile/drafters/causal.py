"""Drafting with a causal LM on packed rows, token after token or level after level of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from emssd_compile.drafters.drawing import best
from emssd_compile.drafters.guesses import Guess, drawn_from, guess, in_eighths
from emssd_compile.drafters.tree_shape import TreeShape
from emssd_compile.errors import OptionError
from emssd_compile.numeric import shown
from emssd_compile.step.drafting import Draft, DraftContext, Drafter, PackedModel
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.pack import Packed, as_trees, pack, pack_one_each
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED, WITHOUT_REPLACEMENT


class CausalDrafter(Drafter):
    """What drafters that run a causal LM of any kind have in common, once it has read what there is to read.

    Chains are drafted greedily, one token a row at a time; each is read as it is drafted.

    Trees are drafted breadth first (2305.09781): behind each node the likeliest tokens. For each level but the last the
    model runs once, on the root and all nodes drafted so far; its cache keeps nothing of them.

    For rows that sample, temperature, top-k and top-p of the request shape q as they shape what the target draws from,
    and the tokens are those with the largest log q + g instead. By default g is the noise with which
    the target draws its own (`randomness.gumbels`): then both mostly draw the same. For a rule that divides by q, g is
    noise of their own: a token of a chain is a draw from q, and the tokens behind a node of a tree are draws without
    replacement, in the order drawn (Gumbel top-k, 1903.06059), or where the rule wants that independent draws, of which
    some may be the same token. Their grades mean nothing then.

    The grade of a draft is the probability that the model gives it where it stands, in eighths.

    Args:
        num_draft_tokens: K, tokens of a chain; 4 unless there is a `tree`.
        tree: how many tokens to draft behind the root, behind each of those, and so on.

    Raises:
        OptionError: an option is out of range, or both are given.
    """

    is_costly = True
    reads_options = ("do_sample", "temperature", "top_k", "top_p")
    num_grades = 8

    def __init__(self, num_draft_tokens: int | None = None, tree: Sequence[int] | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        self.tree = None if tree is None else TreeShape.of(f"{name} tree", tree)
        if self.tree is None:
            self.num_draft_tokens = _chain_length(name, num_draft_tokens)
            self.proposes = (DETERMINISTIC, SAMPLED)
        elif num_draft_tokens is None:
            self.num_draft_tokens, self.max_depth = self.tree.num_nodes, self.tree.depth
            self.proposes = (DETERMINISTIC, WITHOUT_REPLACEMENT, SAMPLED)
        else:
            raise OptionError(
                f"{name} num_draft_tokens={shown(num_draft_tokens)} is for chains, and tree={self.tree.branching} says "
                "how many drafts there are; pass one of them"
            )
        self._packed: PackedModel | None = None

    def _caches(self, context: DraftContext) -> dict[str, Tensor]:
        """The KV caches of the model, by its names."""
        raise NotImplementedError

    def _draft(self, first: Guess, max_drafts: Tensor, lengths: Tensor, context: DraftContext) -> tuple[Draft, Tensor]:
        """All drafts, without any state; and how much of each row the model has read then, `[B]`.

        Args:
            first: what is expected behind the root, `branching[0]` tokens for trees.
            max_drafts: int64 `[B]`, how deep each row may draft.
            lengths: int64 `[B]`, tokens that the model has read, the root among them where `max_drafts` is not 0.
            context: of the drafter.
        """
        if self.tree is None:
            return self._draft_chain(first, max_drafts, lengths, context)
        return self._draft_tree(self.tree, first, max_drafts, context), lengths

    def _draft_chain(
        self, first: Guess, max_drafts: Tensor, lengths: Tensor, context: DraftContext
    ) -> tuple[Draft, Tensor]:
        """Run the model on one token of each row at a time; it stays read."""
        guesses = [first]
        for index in range(1, self.num_draft_tokens):
            going = index < max_drafts
            # Rows that do not go on may be longer than the cache, which no target may be told.
            position = (context.known + index - 1).clamp(max=self._model.capacity)  # [B]
            single, order = pack_one_each(guesses[-1].tokens.squeeze(1), position, going)
            guesses.append(self._predict(single, lengths, order, context, index, first_draft=index))
            lengths = lengths + going
        tokens = torch.cat([one.tokens for one in guesses], 1)  # [B, K]
        grades = in_eighths(torch.cat([one.probabilities for one in guesses], 1))
        counts = max_drafts.clamp(max=self.num_draft_tokens)
        return Draft(tokens, counts, grades=grades, proposal=drawn_from(guesses, self.num_draft_tokens)), lengths

    def _draft_tree(self, tree: TreeShape, first: Guess, max_drafts: Tensor, context: DraftContext) -> Draft:
        """Run the model on the root and all nodes so far, once for each level that has another below it."""
        tokens, known, guesses = first.tokens, context.known, [first]  # [B, nodes so far]
        levels = [first.probabilities]  # [B, nodes of each depth]
        rows, device = known.shape[0], known.device
        parents = tree.parents(device).expand(rows, -1)  # [B, K]
        for depth in range(1, tree.depth):
            max_drafts = self._worth_drafting(levels, max_drafts)
            going = depth < max_drafts
            roots = torch.where(going, known - 1, 0)  # [B], where the others are may be past the cache's end
            count = tokens.shape[1]
            blank = torch.zeros_like(tokens)  # who packs looks at no grades
            drafted = Nodes(tokens, torch.full_like(known, count), blank, parents[:, :count], depth)
            token_range, row_range = (torch.arange(size, device=device) for size in (rows * (count + 1), count + 1))
            packed = pack(context.history, known, roots, going, token_range, row_range, share=count + 1, draft=drafted)
            packed = as_trees(packed, roots, self._model.ancestor_words, drafted)
            newest = packed.roots[:, None] + row_range[-tree.levels[depth - 1] :]  # [B, nodes of this depth]
            newest_guess = self._predict(packed, roots, newest.flatten(), context, depth, tree.branching[depth], count)
            guesses.append(newest_guess)
            tokens = torch.cat([tokens, newest_guess.tokens.view(rows, -1)], 1)
            levels.append(newest_guess.probabilities.view(rows, -1))
        max_drafts = self._worth_drafting(levels, max_drafts)
        counts = (tree.depths(device) <= max_drafts[:, None]).sum(1)  # [B]
        grades, proposal = in_eighths(torch.cat(levels, 1)), drawn_from(guesses, self.num_draft_tokens)
        return Draft(tokens, counts, grades=grades, parents=parents, proposal=proposal)

    def _worth_drafting(self, levels: Sequence[Tensor], max_drafts: Tensor) -> Tensor:
        """How deep each row's tree is drafted, `[B]`, once some of its levels are.

        Args:
            levels: float32 `[B, nodes of a depth]` each, what the model thinks of the drafts there are.
            max_drafts: int64 `[B]`, how deep it may be.
        """
        return max_drafts

    @property
    def _model(self) -> PackedModel:
        assert self._packed is not None, "prepare comes first"
        return self._packed

    def _predict(
        self,
        packed: Packed,
        lengths: Tensor,
        index: Tensor,
        context: DraftContext,
        depth: int,
        count: int = 1,
        first_draft: int = 0,
    ) -> Guess:
        """The best `count` tokens behind the packed tokens that `index[R]` names: as many of each row, all of a depth.

        They are the drafts of their rows from `first_draft` on.
        """
        caches = self._caches(context)
        readable = packed.input_ids.clamp(max=self._model.vocabulary - 1)  # [T]
        _, logits = self._model(replace(packed, input_ids=readable), lengths, index, caches)  # [R, V]
        return guess(logits, count, depth, first_draft, context, self._choose)

    def _choose(self, logits: Tensor, count: int, depth: int, first_draft: int, context: DraftContext) -> Tensor:
        """The `count` tokens to draft behind each node of a depth, `[R, count]`; `logits` are those of q, `[R, V]`."""
        return best(logits, count, depth, first_draft, context)


def _chain_length(name: str, num_draft_tokens: int | None) -> int:
    if num_draft_tokens is None:
        return 4
    if not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
        raise OptionError(f"{name} num_draft_tokens={num_draft_tokens!r} must be an integer of at least 1")
    return num_draft_tokens
