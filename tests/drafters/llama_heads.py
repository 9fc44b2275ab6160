"""What tests of heads that read layers of the target have in common: a small Llama, prompts, random weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import emssd_compile
from emssd_compile.drafters import DynamicTree
from emssd_compile.drafters.head import Features
from emssd_compile.step.drafting import TokenTables
from tests.drafters.contexts import target_of
from tests.drafters.plain_heads import tapped
from tests.exactness.models import build, prompt
from tests.zoo import VOCABULARY

HIDDEN, ROWS, NEW = 64, 3, 10
PROMPTS = [prompt(n) for n in (1, 7, 30, 45)]
TREE = DynamicTree(nodes=7, depth=3, width=3)
THIRD = tuple(range(1, VOCABULARY, 3))
"""What heads draft that know fewer tokens than the target."""


@functools.cache
def target() -> Any:
    """The target."""
    return build("llama")


@torch.no_grad()
def loud(head: Any) -> Any:
    """The head with random weights that draft something else for each text."""
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.5))
    if head.config.draft_vocabulary < VOCABULARY:
        head.draft_ids.copy_(torch.tensor(THIRD))
    return head


def optimized(head: Any, **options: Any) -> Any:
    """The target with a head."""
    given = {
        "max_batch": ROWS,
        "max_length": 45 + NEW,
        "backend": "eager",
        "layout": "packed",
        "prefill_chunk": 24,
        **options,
    }
    return emssd_compile.optimize(target(), head, **given)


@functools.cache
def plainly(**options: Any) -> list[list[int]]:
    """Without drafts."""
    fast: Any = optimized("none")
    return fast.generate(PROMPTS, max_new_tokens=NEW, **options)


SAMPLED = {"do_sample": True, "seed": 3, "temperature": 1.5, "top_k": 20}


def shape(logits: Tensor) -> Tensor:
    """As `SAMPLED` shapes what is drawn from."""
    return torch.where(logits >= logits.topk(20).values[-1], logits / 1.5, -torch.inf)


def features_of(texts: list[list[int]], head: Any) -> Features:
    """What the target computes of texts of one length."""
    computed = [tapped(target(), text, head.taps) for text in texts]
    taps = {tap: torch.stack([outputs[index] for outputs, _ in computed]) for index, tap in enumerate(head.taps)}
    return Features(torch.tensor(texts), torch.stack([hidden for _, hidden in computed]), taps)


def prepared(head: Any) -> Any:
    """The head, which has seen the target."""
    model = target()
    tables = TokenTables(model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach())
    head.prepare(target_of(None, ROWS, 96, VOCABULARY, HIDDEN, tables))
    return head


def learn(head: Any, texts: list[list[int]]) -> None:
    """The texts by heart."""
    read = [features_of([row], head) for row in texts]
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    for _ in range(60):
        for features in read:
            tokens = features.tokens[0, 2:]
            losses = [
                F.cross_entropy(logits[0, : len(tokens) - k], tokens[k:])
                for k, logits in enumerate(head.rollout(features))
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
