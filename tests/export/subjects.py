"""A small model, decoded by each backend and target with each kind of drafter. Compiling takes time: once for each."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn import functional as F

import emssd_compile
from emssd_compile.drafters import (
    Draft,
    DraftContext,
    Drafter,
    DraftModel,
    PartSizes,
    PromptLookup,
    TargetInitialized,
    TensorSpec,
)
from emssd_compile.optimized_model import OptimizedModel

VOCABULARY, WIDTH, HEADS, ROWS, CAPACITY, K = 48, 32, 4, 3, 2048, 4
DRAFTERS = ("none", "lookup", "draft-model", "last-bigram", "forks")


class Small(nn.Module):
    """One layer of attention without positions; needs nothing but torch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(attended.transpose(1, 2).flatten(2)))


class LastBigram(Drafter):
    """Remembers, for each row and token, what followed it last: a drafter with a state of its own."""

    num_draft_tokens = 2

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """`followers[B, V]`: the token that followed each token last."""
        return {"followers": TensorSpec((sizes.rows, sizes.vocabulary), torch.int64)}

    def forward(self, context: DraftContext) -> Draft:
        """What followed the newest token last, twice."""
        newest = context.history.gather(1, (context.known[:, None] - 2).clamp(min=0) + torch.arange(2))
        followers = context.state["followers"].scatter(1, newest[:, :1], newest[:, 1:])
        first = followers.gather(1, newest[:, 1:])
        tokens = torch.cat([first, followers.gather(1, first)], 1)
        return Draft(tokens, torch.full_like(context.known, 2), {"followers": followers})


class Forks(Drafter):
    """Trees: what prompt lookup drafts, each draft behind a wrong one that follows the same node."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = PromptLookup(K)
        self.num_draft_tokens, self.max_depth = 2 * K, K

    def forward(self, context: DraftContext) -> Draft:
        """Node `2 i` is the i-th draft of the chain, and node `2 i - 1` the wrong one beside it."""
        chain = self.chain(context)
        tokens = torch.stack([(chain.tokens + 1) % VOCABULARY, chain.tokens], 2).flatten(1)
        parents = torch.arange(2 * K) // 2 * 2
        return Draft(tokens, 2 * chain.lengths, parents=parents.expand_as(tokens))


def drafter(name: str) -> str | nn.Module:
    """A drafter of `DRAFTERS`, or one that reads the target's logits and stops early."""
    made: dict[str, str | nn.Module] = {
        "none": "none",
        "lookup": PromptLookup(K),
        "draft-model": DraftModel(Small(), K),  # the target itself: always right
        "last-bigram": LastBigram(),
        "forks": Forks(),
        "target-initialized": TargetInitialized(Small(), 3, 2, threshold=0.01),
    }
    return made[name]


@functools.cache
def optimized(name: str, backend: str = "eager") -> OptimizedModel:
    """The model with a drafter of `DRAFTERS`."""
    return emssd_compile.optimize(
        Small(), drafter(name), max_batch=ROWS, max_length=CAPACITY, backend=backend, layout="packed", prefill_chunk=27
    )


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # removed when Python ends


@functools.cache
def artifact(target: str, name: str) -> Path:
    """The step with a drafter, exported to a target."""
    return export(target, name)


def export(target: str, name: str, model: OptimizedModel | None = None, **options: Any) -> Path:
    """The same, anew, or that of another model; with options of the export."""
    folder = Path(tempfile.mkdtemp(dir=_temporary().name)) / name
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # to be quick
        getattr(model or optimized(name), f"export_{target}")(folder, **options)
    return folder


def prompt(length: int) -> list[int]:
    """A prompt of so many tokens, which repeats itself now and then."""
    generator = torch.Generator().manual_seed(length)
    alphabet = torch.randint(VOCABULARY, (6,), generator=generator)
    return alphabet[torch.randint(6, (length,), generator=generator)].tolist()
