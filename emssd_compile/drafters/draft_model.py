"""Classic two-model speculation: a smaller causal LM drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emssd_compile.drafters.drawing import best, over, shaped
from emssd_compile.drafters.tree_shape import TreeShape
from emssd_compile.drafters.vocabularies import difference
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.drafting import Draft, DraftContext, Drafter, PackedModel, Target, most_unread
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.pack import Packed, as_trees, pack, pack_one_each
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED, WITHOUT_REPLACEMENT
from emssd_compile.step.tensor_spec import TensorSpec


class DraftModel(Drafter):
    """A second causal LM, compiled by the same passes, with its own unpadded KV cache (2211.17192, 2302.01318).

    Each step it first reads the tokens it has not seen, all rows packed together: a chunk of the prompt in prefill, and
    what was accepted in decoding. Then it drafts. The grade of a draft is the probability that the draft model gives it
    where it stands, in eighths.

    Chains are drafted greedily, one token a row at a time; each is read as it is drafted, so that later at most two
    tokens of a row are left to read, the last draft and the one after it.

    Trees are drafted breadth first (2305.09781): behind each node the likeliest tokens. For each level but the last the
    draft model runs once, on the root and all nodes drafted so far; its cache keeps nothing of them, and what is
    accepted is read in the next step.

    For rows that sample, temperature, top-k and top-p of the request shape q as they shape what the target draws from,
    and the tokens are those with the largest log q + g instead. By default g is the noise with which
    the target draws its own (`randomness.gumbels`): then both mostly draw the same. For a rule that divides by q, g is
    noise of their own: a token of a chain is a draw from q, and the tokens behind a node of a tree are draws without
    replacement, in the order drawn (Gumbel top-k, 1903.06059), or where the rule wants that independent draws, of which
    some may be the same token. Their grades mean nothing then.

    A draft model may have fewer positions than the target: it drafts as far as they go, and rows that are longer decode
    without drafts. Its vocabulary may be padded to another size than the target's: an id past the target's ends a
    draft, and an id past its own is read as its last one.

    Args:
        model: a causal LM over the target's vocabulary.
        num_draft_tokens: K, tokens of a chain; 4 unless there is a `tree`.
        tree: how many tokens to draft behind the root, behind each of those, and so on.

    Raises:
        OptionError: an option is out of range, or both are given.

    Example:
        `tree=(4, 2, 2)` drafts the 4 likeliest tokens behind the root, and two more times the 2 likeliest behind each
        of the newest: K = 4 + 8 + 16 drafts, of which at most D = 3 are accepted.
    """

    reads_ahead = is_costly = True
    reads_options = ("do_sample", "temperature", "top_k", "top_p")
    num_grades = 8

    def __init__(
        self, model: nn.Module, num_draft_tokens: int | None = None, *, tree: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tree = None if tree is None else TreeShape.of("DraftModel tree", tree)
        if self.tree is None:
            self.num_draft_tokens = _chain_length(num_draft_tokens)
            self.proposes = (DETERMINISTIC, SAMPLED)
        elif num_draft_tokens is None:
            self.num_draft_tokens, self.max_depth = self.tree.num_nodes, self.tree.depth
            self.proposes = (DETERMINISTIC, WITHOUT_REPLACEMENT, SAMPLED)
        else:
            raise OptionError(
                f"DraftModel num_draft_tokens={num_draft_tokens!r} is for chains, and tree={self.tree.branching} says "
                "how many drafts there are; pass one of them"
            )
        self._packed: PackedModel | None = None
        self._notes: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, path: str, num_draft_tokens: int | None = None, *, tree: Sequence[int] | None = None, **options: Any
    ) -> DraftModel:
        """Load a Hugging Face causal LM (`options` go to its `from_pretrained`) and draft with it."""
        return cls(load_causal_lm(path, **options), num_draft_tokens, tree=tree)

    def prepare(self, target: Target) -> None:
        """Compile the model.

        Raises:
            DrafterError: its vocabulary is not the target's, up to padding, or it has fewer tokens than the tree wants
                behind one node.
        """
        # The last level of a tree is never fed.
        vocabulary, nodes = target.vocabulary, 1 + sum(self.tree.levels[:-1]) if self.tree else 0
        packed = target.compile_model(self.model, tree_nodes=nodes)
        padding = difference(packed.vocabulary, vocabulary)
        if self.tree and max(self.tree.branching) > min(packed.vocabulary, vocabulary):
            raise DrafterError(
                f"{type(self).__name__} drafts {max(self.tree.branching)} tokens behind one node, and there are only "
                f"{min(packed.vocabulary, vocabulary)} in the vocabulary; draft fewer"
            )
        self._packed = packed
        self._notes = (
            *(
                [f"the draft model drafts up to position {packed.capacity}"]
                if packed.capacity < target.capacity
                else []
            ),
            *([f"vocabularies of {packed.vocabulary} and {vocabulary}: taken for padding"] if padding else []),
        )

    def notes(self) -> tuple[str, ...]:
        """In what the draft model and the target differ."""
        return self._notes

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """`lengths` int64 `[B]`, tokens whose KV the draft model has written, and its KV caches."""
        return {"lengths": TensorSpec((sizes.rows,), torch.int64), **self._model.cache_shapes}

    def forward(self, context: DraftContext) -> Draft:
        """Read what is new, then draft.

        Tokens `[B, K]`, lengths `[B]`, grades `[B, K]`, of trees parents `[B, K]`, and if drafts are drawn, what from,
        `[B, K + 1, V]`.
        """
        known, capacity = context.known, self._model.capacity
        has_place = known <= capacity  # [B], whether the root token has a position
        # KV of drafts that were rejected is stale: it counts only up to the root token.
        lengths = torch.minimum(context.state["lengths"], (known - 1).clamp(min=0))
        packed = pack(
            history=context.history,
            known=known,
            lengths=lengths,
            active=context.active & has_place,
            token_range=context.draft_range,
            row_range=context.row_range,
            share=most_unread(self.max_depth),
        )
        max_drafts = torch.minimum(context.max_drafts, capacity - known + 1)  # [B], the deepest ones are not fed
        max_drafts = torch.where(context.can_draft & packed.ready, max_drafts, 0)
        first = self._predict(packed, lengths, packed.roots, context, 0, self.tree.branching[0] if self.tree else 1)
        lengths = lengths + packed.fed
        if self.tree is None:
            return self._draft_chain(first, max_drafts, lengths, context)
        return self._draft_tree(self.tree, first, max_drafts, lengths, context)

    def _draft_chain(self, first: _Guess, max_drafts: Tensor, lengths: Tensor, context: DraftContext) -> Draft:
        """Run the model on one token of each row at a time; it stays read."""
        guesses = [first]
        for index in range(1, self.num_draft_tokens):
            going = index < max_drafts
            # Rows that do not go on may be longer than the cache, which no target may be told.
            position = (context.known + index - 1).clamp(max=self._model.capacity)  # [B]
            single, order = pack_one_each(guesses[-1].tokens.squeeze(1), position, going)
            guesses.append(self._predict(single, lengths, order, context, index, first_draft=index))
            lengths = lengths + going
        tokens = torch.cat([guess.tokens for guess in guesses], 1)  # [B, K]
        grades = self._graded([guess.probabilities for guess in guesses])
        counts = max_drafts.clamp(max=self.num_draft_tokens)
        return Draft(tokens, counts, {"lengths": lengths}, grades, proposal=self._proposal(guesses))

    def _draft_tree(
        self, tree: TreeShape, first: _Guess, max_drafts: Tensor, lengths: Tensor, context: DraftContext
    ) -> Draft:
        """Run the model on the root and all nodes so far, once for each level that has another below it."""
        tokens, known, guesses = first.tokens, context.known, [first]  # [B, nodes so far]
        levels = [first.probabilities]  # [B, nodes of each depth]
        rows, device = len(known), known.device
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
            guess = self._predict(packed, roots, newest.flatten(), context, depth, tree.branching[depth], count)
            guesses.append(guess)
            tokens = torch.cat([tokens, guess.tokens.view(rows, -1)], 1)
            levels.append(guess.probabilities.view(rows, -1))
        max_drafts = self._worth_drafting(levels, max_drafts)
        counts = (tree.depths(device) <= max_drafts[:, None]).sum(1)  # [B]
        return Draft(tokens, counts, {"lengths": lengths}, self._graded(levels), parents, self._proposal(guesses))

    def _worth_drafting(self, levels: Sequence[Tensor], max_drafts: Tensor) -> Tensor:
        """How deep each row's tree is drafted, `[B]`, once some of its levels are.

        Args:
            levels: float32 `[B, nodes of a depth]` each, what the draft model thinks of the drafts there are.
            max_drafts: int64 `[B]`, how deep it may be.
        """
        return max_drafts

    def _graded(self, levels: Sequence[Tensor]) -> Tensor:
        """The grades of all drafts, `[B, K]`: their probabilities in eighths."""
        return (torch.cat([*levels], 1) * self.num_grades).long().clamp(0, self.num_grades - 1)

    def _proposal(self, guesses: Sequence[_Guess]) -> Tensor | None:
        """What drafts were drawn from, `[B, K + 1, V]`, nodes in order; None if they were not drawn."""
        lines = [guess.proposal for guess in guesses if guess.proposal is not None]
        if not lines:
            return None
        drawn_from = torch.cat(lines, 1)
        rows, nodes, vocabulary = drawn_from.shape
        leaves = drawn_from.new_zeros((rows, self.num_draft_tokens + 1 - nodes, vocabulary))
        return torch.cat([drawn_from, leaves], 1)

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
    ) -> _Guess:
        """The best `count` tokens behind the packed tokens that `index[R]` names: as many of each row, all of a depth.

        They are the drafts of their rows from `first_draft` on.
        """
        caches = {name: context.state[name] for name in self._model.cache_shapes}
        readable = packed.input_ids.clamp(max=self._model.vocabulary - 1)  # [T]
        _, logits = self._model(replace(packed, input_ids=readable), lengths, index, caches)  # [R, V]
        logits, proposal = logits.float(), None
        if context.drawn != DETERMINISTIC:
            logits = over(logits, context.vocabulary)
        logits = shaped(logits, context)
        if context.drawn != DETERMINISTIC:
            proposal = logits.softmax(1).view(len(context.known), -1, context.vocabulary)
        tokens = self._choose(logits, context, depth, count, first_draft)
        probabilities = (logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)).exp()
        return _Guess(tokens, probabilities, proposal)

    def _choose(self, logits: Tensor, context: DraftContext, depth: int, count: int, first_draft: int) -> Tensor:
        """The `count` tokens to draft behind each node of a depth, `[R, count]`; `logits` are those of q, `[R, V]`."""
        return best(logits, count, depth, first_draft, context)


def load_causal_lm(path: str, **options: Any) -> nn.Module:
    """A Hugging Face causal LM in eval mode; `options` go to its `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.eval()


class _Guess(NamedTuple):
    """What the draft model expects next.

    Attributes:
        tokens: int64 `[R, W]`, the likeliest tokens behind each of R, the likeliest first; or as they were drawn.
        probabilities: float32 `[R, W]`, what the draft model gives each of them where it stands.
        proposal: float32 `[B, R / B, V]`, what they were drawn from, if they were.
    """

    tokens: Tensor
    probabilities: Tensor
    proposal: Tensor | None


def _chain_length(num_draft_tokens: int | None) -> int:
    if num_draft_tokens is None:
        return 4
    if not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
        raise OptionError(f"DraftModel num_draft_tokens={num_draft_tokens!r} must be an integer of at least 1")
    return num_draft_tokens
