"""What rules emit, as a law over texts: by drawing, and by decoding. The exact one is that of `laws`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import emssd_compile
from emssd_compile.drafters import DraftModel
from emssd_compile.step.acceptance import Rule, Verification
from emssd_compile.step.proposals import DETERMINISTIC, WITHOUT_REPLACEMENT
from tests.acceptance.laws import Shape, World, completed

FALSE_ALARM = 1e-6
"""How rarely a chi-square test fails of a rule that is right: seeds are fixed, so it is decided once."""


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
    expected = completed(world, torch.zeros(world.p.numel() + 1, dtype=torch.float64), longest).expected
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
    new = torch.tensor([row[len(prompt) : len(prompt) + tokens] for row in found])
    return chi_square(*counts_of(new, target, prompt)), fast.stats


def counts_of(
    new: Tensor, target: nn.Module, prompt: list[int], change: Callable[[Tensor, Tensor], Tensor] = lambda x, _: x
) -> tuple[Tensor, Tensor]:
    """How many of many rows continue a prompt with each text of n tokens, and how many are to be expected.

    Args:
        new: int64 `[rows, n]`.
        target: a model of five tokens.
        prompt: of all rows.
        change: what is done to the logits `[texts, V]` behind texts `[texts, length]`, prompt included; float64.
    """
    texts, expected = torch.tensor([prompt]), torch.ones(1, dtype=torch.float64)
    for _ in range(new.shape[1]):
        with torch.no_grad():
            p = change(target(texts)[:, -1].double(), texts).softmax(1)
        expected = (expected[:, None] * p).flatten()
        texts = torch.cat([texts.repeat_interleave(5, 0), torch.arange(5).repeat(len(texts))[:, None]], 1)
    number = (new * 5 ** torch.arange(new.shape[1] - 1, -1, -1)).sum(1)  # as texts are in order
    return torch.bincount(number, minlength=len(expected)), expected * len(new)
