"""What rules emit, as a law over texts: by exact enumeration of drafts and tests, by drawing, and by decoding.

A text is a number: the empty one is 0, and text `t` goes on with token `v` as `V t + 1 + v`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import emssd_compile
from emssd_compile.acceptance.sampling import Decision, Odds
from emssd_compile.drafters import DraftModel
from emssd_compile.step.acceptance import Rule, Verification
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED, WITHOUT_REPLACEMENT

FALSE_ALARM = 1e-6
"""How rarely a chi-square test fails of a rule that is right: seeds are fixed, so it is decided once."""

Decide = Callable[[Odds], Decision]


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
    return _completed(world, ended, shape.depth + 1)


def worst(decide: Decide, shape: Shape, vocabulary: int, drawn: str, *, mixes_up: bool = False) -> float:
    """The largest error of the law in some random worlds: of a mistake, far from rounding."""
    worlds = [World.of("random", vocabulary, shape.depth, seed) for seed in range(6)]
    return max(law(decide, shape, world, drawn, mixes_up=mixes_up).error for world in worlds)


def _completed(world: World, ended: Tensor, length: int) -> Emitted:
    vocabulary = world.vocabulary
    so_far, plain, texts, mean = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0, 0.0
    for tokens in range(1, length + 1):
        p = world.p[texts : texts + len(plain)]  # [texts of one length, V]
        plain = (plain[:, None] * p).flatten()
        texts = vocabulary * texts + 1
        so_far = (so_far[:, None] * p).flatten() + ended[texts : texts + len(plain)]
        mean += tokens * float(ended[texts : texts + len(plain)].sum())
    return Emitted(so_far, plain, mean)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """How likely counts as far from `expected` (both `[n]`) are by chance."""
    assert int(counts[expected == 0].sum()) == 0, "what cannot be came out"
    counts, expected = counts[expected > 0], expected[expected > 0]
    few = expected < 5  # together they make one
    counts, expected = (torch.cat([w[~few], w[few].sum()[None]]) for w in (counts.double(), expected.double()))
    counts, expected = counts[expected > 0], expected[expected > 0]
    distance = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), distance / 2))


def drawn_by(rule: Rule, shape: Shape, world: World, drawn: str, rows: int = 200_000) -> float:
    """By drawing: how likely the texts that `rule.forward` gives are. Some rows draft less, some do not sample.

    Rows lie side by side with places for nobody behind them.
    """
    generator, count = torch.Generator().manual_seed(1), len(shape.parents)
    vocabulary, longest = world.vocabulary, shape.depth + 1
    tokens = torch.zeros((rows, count), dtype=torch.int64)
    for draft, parent in enumerate(shape.parents):
        texts = world.texts(shape, tokens)
        replaced = drawn != WITHOUT_REPLACEMENT
        q = world.q[texts[:, parent]] if replaced else world.left_of_q(shape, tokens, texts, draft)
        tokens[:, draft] = torch.multinomial(q, 1, generator=generator).squeeze(1)
    texts = world.texts(shape, tokens)
    lengths = torch.full((rows,), count)
    lengths[rows // 2 :: 3] = count - 1
    fed = lengths + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), fed.cumsum(0)])
    row_ids = torch.cat([torch.arange(rows).repeat_interleave(fed), torch.zeros(2, dtype=torch.int64)])
    node = torch.arange(len(row_ids)) - offsets[row_ids]
    node[-2:] = 0
    samples = torch.arange(rows) % 5 > 0
    proposal = None if drawn == DETERMINISTIC else world.q[texts].float()
    verdict = rule(
        Verification(
            logits=world.p[texts[row_ids, node]].log().float() + 3,
            offsets=offsets,
            draft=shape.nodes(tokens, proposal, lengths),
            row_ids=row_ids,
            seeds=torch.randint(-(2**62), 2**62, (rows,), generator=generator)[row_ids],
            positions=17 + node,
            options={"do_sample": samples},
            drawn=drawn,
        )
    )
    last = verdict.accept_lengths
    if verdict.path is not None:
        last = verdict.path.gather(1, last[:, None]).squeeze(1)
    text = vocabulary * texts[torch.arange(rows), last] + 1 + verdict.next_tokens
    starts = [0]
    for _ in range(longest):
        starts.append(vocabulary * starts[-1] + 1)
    for start in starts[1:-1]:  # those that emitted less go on by themselves
        short = (text >= start) & (text < vocabulary * start + 1)
        following = torch.multinomial(world.p[text[short]], 1, generator=generator).squeeze(1)
        text[short] = vocabulary * text[short] + 1 + following
    _check_greedy(world, texts, shape, lengths, last, verdict.next_tokens, ~samples)
    expected = _completed(world, torch.zeros(world.p.numel() + 1, dtype=torch.float64), longest).expected
    counts = torch.bincount(text[samples] - starts[-1], minlength=len(expected))
    return chi_square(counts, expected * int(samples.sum()))


def _check_greedy(
    world: World, texts: Tensor, shape: Shape, lengths: Tensor, last: Tensor, following: Tensor, rows: Tensor
) -> None:
    """Rows that do not sample go as far as drafts are the likeliest token, and on with that."""
    likeliest = world.p.argmax(1)
    for row in rows.nonzero().flatten()[:300].tolist():
        node = 0
        while True:
            right = [
                draft + 1
                for draft in range(int(lengths[row]))
                if shape.parents[draft] == node
                and int(texts[row, draft + 1])
                == world.vocabulary * int(texts[row, node]) + 1 + int(likeliest[texts[row, node]])
            ]
            if not right:
                break
            node = right[0]
        assert (int(last[row]), int(following[row])) == (node, int(likeliest[texts[row, node]]))


class Tiny(nn.Module):
    """One layer of attention over five tokens."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        width, generator = 8, torch.Generator().manual_seed(seed)
        self.embed, self.head = nn.Embedding(5, width), nn.Linear(width, 5)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part(x)[:, None] for part in (self.q, self.k, self.v))
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


def decoded_by(
    rule: str, *, layout: str = "packed", rows: int = 8192, tokens: int = 3, **drafts: object
) -> tuple[float, emssd_compile.Stats]:
    """By decoding: how likely the first tokens of many requests are, and what decoding did.

    The drafts are those of another model. Each request asks for one more token than is looked at: where a row ends, it
    drafts less.
    """
    target, prompt = Tiny(0), [3, 1, 4]
    fast = emssd_compile.optimize(
        target,
        DraftModel(Tiny(1), **drafts),  # type: ignore[arg-type]
        max_batch=256,
        max_length=16,
        backend="eager",
        layout=layout,
        acceptance=rule,
    )
    found = fast.generate([prompt] * rows, max_new_tokens=tokens + 2, do_sample=True, seed=5)
    texts = [(0, prompt)]
    expected = torch.ones(1, dtype=torch.float64)
    for _ in range(tokens):
        with torch.no_grad():
            p = target(torch.tensor([text for _, text in texts]))[:, -1].double().softmax(1)
        expected = (expected[:, None] * p).flatten()
        texts = [(5 * number + token, [*text, token]) for number, text in texts for token in range(5)]
    numbers = {tuple(text): number for number, text in texts}
    counts = torch.bincount(
        torch.tensor([numbers[tuple(row[: len(prompt) + tokens])] for row in found]), minlength=len(texts)
    )
    return chi_square(counts, expected * rows), fast.stats


def with_weights(decide: Decide, change: Callable[[Odds, Decision], Tensor]) -> Decide:
    """A decision with the next token drawn from something else: a mistake."""

    def mistaken(odds: Odds) -> Decision:
        decision = decide(odds)
        return replace(decision, weights=change(odds, decision))

    return mistaken


__all__ = [
    "DETERMINISTIC",
    "FALSE_ALARM",
    "SAMPLED",
    "TREES",
    "WITHOUT_REPLACEMENT",
    "Decide",
    "Emitted",
    "Shape",
    "Tiny",
    "World",
    "chain",
    "chi_square",
    "decoded_by",
    "drawn_by",
    "law",
    "with_weights",
    "worst",
]
