"""What rules emit, as a law over texts: by exact enumeration of drafts and tests.

A text is a number: the empty one is 0, and text `t` goes on with token `v` as `V t + 1 + v`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from emssd_compile.acceptance.sampling import Decision, Odds
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED, WITHOUT_REPLACEMENT

Decide = Callable[[Odds], Decision]

KINDS = ("random", "zeros", "ties", "disjoint", "the same", "certain")
"""Of worlds."""


@dataclass(frozen=True)
class Shape:
    """A shape of drafts: the node that each follows, and whether the rule is told that it is a tree."""

    parents: tuple[int, ...]
    is_tree: bool

    @property
    def depth(self) -> int:
        """D."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return max(depths)

    def nodes(self, tokens: Tensor, proposal: Tensor | None = None, lengths: Tensor | None = None) -> Nodes:
        """Drafts of this shape, `tokens[B, K]`."""
        rows = len(tokens)
        parents = torch.tensor(self.parents, dtype=torch.int64).expand(rows, -1)
        lengths = torch.full((rows,), tokens.shape[1]) if lengths is None else lengths
        return Nodes(tokens, lengths, tokens, parents if self.is_tree else None, self.depth, proposal)


def chain(length: int, *, as_tree: bool = False) -> Shape:
    """A chain, perhaps as a tree of one path."""
    return Shape(tuple(range(length)), as_tree)


TREES = {
    "siblings": Shape((0, 0, 0), is_tree=True),
    "two levels": Shape((0, 0, 1, 1, 2, 2), is_tree=True),
    "uneven": Shape((0, 1, 0, 3, 3, 2), is_tree=True),
    "a branch late": Shape((0, 1, 2, 2, 0), is_tree=True),
}
VOCABULARIES = {"siblings": 4, "two levels": 2, "uneven": 2, "a branch late": 3}
"""How many tokens there are for each of these trees, so that all drafts can be enumerated."""


@dataclass(frozen=True)
class World:
    """What a target and a drafter say behind each text: p and q, float64 `[texts, V]`."""

    p: Tensor
    q: Tensor

    @classmethod
    def of(cls, kind: str, vocabulary: int, depth: int, seed: int = 0) -> World:
        """Random ones of a kind, for texts of up to `depth` tokens."""
        generator = torch.Generator().manual_seed(seed)
        texts = sum(vocabulary**length for length in range(depth + 1))
        p, q = (torch.rand((texts, vocabulary), generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
        if kind == "zeros":
            p, q = (w * (torch.rand(w.shape, generator=generator) < 0.6) for w in (p, q))
        elif kind == "ties":
            p, q = (torch.randint(1, 3, w.shape, generator=generator).double() for w in (p, q))
        elif kind == "disjoint":
            half = torch.arange(vocabulary) < vocabulary // 2
            p, q = p * half, q * ~half
        elif kind == "the same":
            q = p
        elif kind == "certain":
            q = F.one_hot(q.argmax(1), vocabulary).double()
        first = F.one_hot(torch.zeros(texts, dtype=torch.int64), vocabulary).double()
        p, q = (torch.where(w.sum(1, keepdim=True) > 0, w, first) for w in (p, q))
        return cls(p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True))

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.p.shape[1]

    def texts(self, shape: Shape, tokens: Tensor) -> Tensor:
        """int64 `[B, K + 1]`: the text up to each node."""
        texts = [torch.zeros_like(tokens[:, 0])]
        for draft, parent in enumerate(shape.parents):
            texts.append(self.vocabulary * texts[parent] + 1 + tokens[:, draft])
        return torch.stack(texts, 1)

    def drafts(self, shape: Shape, drawn: str) -> tuple[Tensor, Tensor]:
        """All drafts of a shape that can be, `[B, K]`, and how likely each is, `[B]`."""
        count = len(shape.parents)
        tokens = torch.tensor(list(itertools.product(range(self.vocabulary), repeat=count)), dtype=torch.int64)
        texts, likely = self.texts(shape, tokens), torch.ones(len(tokens), dtype=torch.float64)
        for draft, parent in enumerate(shape.parents):
            q = (
                self.left_of_q(shape, tokens, texts, draft)
                if drawn == WITHOUT_REPLACEMENT
                else self.q[texts[:, parent]]
            )
            likely = likely * q.gather(1, tokens[:, draft, None]).squeeze(1)
        return tokens[likely > 0], likely[likely > 0]

    def left_of_q(self, shape: Shape, tokens: Tensor, texts: Tensor, draft: int) -> Tensor:
        """What a draft is drawn from, `[B, V]`, when its earlier siblings were; when all is drawn, the first other."""
        parent = shape.parents[draft]
        q, taken = self.q[texts[:, parent]], torch.zeros(len(tokens), self.vocabulary, dtype=torch.bool)
        for sibling in range(draft):
            if shape.parents[sibling] == parent:
                taken = taken | (tokens[:, sibling, None] == torch.arange(self.vocabulary))
        q = torch.where(taken, 0, q)
        other = F.one_hot((~taken).int().argmax(1), self.vocabulary).double()
        return torch.where(q.sum(1, keepdim=True) > 0, q / q.sum(1, keepdim=True).clamp(min=1e-300), other)


@dataclass(frozen=True)
class Emitted:
    """The law of what a step emits, completed by draws from p.

    Attributes:
        of_texts: `[texts]`, how likely it is that a text of D + 1 tokens comes out.
        expected: the same of plain draws from p.
        mean_tokens: of a step.
    """

    of_texts: Tensor
    expected: Tensor
    mean_tokens: float

    @property
    def error(self) -> float:
        """The largest difference between the two."""
        return float((self.of_texts - self.expected).abs().max())


def law(
    decide: Decide, shape: Shape, world: World, drawn: str, *, lengths: int | None = None, mixes_up: bool = False
) -> Emitted:
    """By enumeration: all drafts that there may be, and each test passed and failed.

    A number of 0 passes any test that can be passed, a number of 1 none; how likely that is, the decision says.

    Args:
        decide: of a rule.
        shape, world, drawn: what is drafted.
        lengths: how many of the drafts are verified; None for all.
        mixes_up: whether all rows take what the first one was drafted from for their own.
    """
    tokens, likely = world.drafts(shape, drawn)
    count, vocabulary = tokens.shape[1], world.vocabulary
    numbers = torch.tensor(list(itertools.product([0.0, 1.0], repeat=count)), dtype=torch.float64)
    tokens, likely = tokens.repeat_interleave(len(numbers), 0), likely.repeat_interleave(len(numbers))
    numbers = numbers.repeat(len(tokens) // len(numbers), 1)  # [B, K]
    texts, rows = world.texts(shape, tokens), torch.arange(len(tokens))
    proposal = world.q[texts]  # [B, N, V]
    if mixes_up:
        proposal = proposal[:1].expand_as(proposal)
    verified = None if lengths is None else torch.full((len(tokens),), lengths)
    nodes = shape.nodes(tokens, None if drawn == DETERMINISTIC else proposal, verified)
    offsets = torch.arange(len(tokens) + 1) * (count + 1)
    decision = decide(Odds(nodes, world.p[texts].flatten(0, 1), offsets, numbers, drawn))
    likely = likely * torch.where(numbers == 0, decision.chances, 1 - decision.chances).prod(1)
    left = decision.weights.sum(1, keepdim=True)
    assert bool((left[likely > 1e-12] > 0).all()), "something is left wherever one gets"
    following = likely[:, None] * decision.weights / left.clamp(min=1e-300)  # [B, V]
    ended = torch.zeros(world.p.numel() + 1, dtype=torch.float64)  # by the text emitted
    emitted = vocabulary * texts[rows, decision.node, None] + 1 + torch.arange(vocabulary)  # [B, V]
    ended.index_add_(0, emitted.flatten(), following.flatten())
    return completed(world, ended, shape.depth + 1)


def assert_lossless(
    decide: Decide,
    shape: Shape,
    vocabulary: int,
    kind: str,
    drawn: str,
    *,
    seeds: tuple[int, ...] = (2,),
    left: int = 1,
) -> None:
    """The law is that of the target in worlds of a kind, with all drafts verified and with up to `left` left out."""
    for seed in seeds:
        world = World.of(kind, vocabulary, shape.depth, seed)
        for verified in range(len(shape.parents) - left, len(shape.parents) + 1):
            assert law(decide, shape, world, drawn, lengths=verified).error < 1e-9


def worst(decide: Decide, shape: Shape, vocabulary: int, drawn: str, *, mixes_up: bool = False) -> float:
    """The largest error of the law in some random worlds: of a mistake, far from rounding."""
    worlds = [World.of("random", vocabulary, shape.depth, seed) for seed in range(6)]
    return max(law(decide, shape, world, drawn, mixes_up=mixes_up).error for world in worlds)


def completed(world: World, ended: Tensor, length: int) -> Emitted:
    """The law of texts of so many tokens, for `ended[texts]`, how likely each is to be what is emitted."""
    vocabulary = world.vocabulary
    so_far, plain, texts, mean = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0, 0.0
    for tokens in range(1, length + 1):
        p = world.p[texts : texts + len(plain)]  # [texts of one length, V]
        plain = (plain[:, None] * p).flatten()
        texts = vocabulary * texts + 1
        so_far = (so_far[:, None] * p).flatten() + ended[texts : texts + len(plain)]
        mean += tokens * float(ended[texts : texts + len(plain)].sum())
    return Emitted(so_far, plain, mean)


def with_weights(decide: Decide, change: Callable[[Odds, Decision], Tensor]) -> Decide:
    """A decision with the next token drawn from something else: a mistake, such as those that follow."""

    def mistaken(odds: Odds) -> Decision:
        decision = decide(odds)
        return replace(decision, weights=change(odds, decision))

    return mistaken


def from_p(odds: Odds, decision: Decision) -> Tensor:
    """No residual: what was kept is not taken off p."""
    return odds.p(decision.node)


def bonus_from_q(odds: Odds, decision: Decision) -> Tensor:
    """The token behind a leaf comes from the draft."""
    return torch.where(_is_leaf(odds, decision), odds.q(decision.node), decision.weights)


def old_residual(odds: Odds, decision: Decision) -> Tensor:
    """That of the token-level rule."""
    left = (odds.p(decision.node) - odds.q(decision.node)).clamp(min=0)
    is_left = ~_is_leaf(odds, decision) & (left.sum(1, keepdim=True) > 0)
    return torch.where(is_left, left, odds.p(decision.node))


def _is_leaf(odds: Odds, decision: Decision) -> Tensor:
    """Bool `[B, 1]`, whether nothing was drafted behind the node that was reached."""
    return ~(odds.draft.exist & (odds.parents == decision.node[:, None])).any(1, keepdim=True)


def taken_for_independent(decide: Decide) -> Decide:
    """The rule is told that drafts were drawn independently, whatever they were: another mistake."""
    return lambda odds: decide(replace(odds, drawn=SAMPLED))
