"""Draft heads of every kind, untrained and trained, for three families of targets: the tokens are the targets' own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from emssd_compile.drafters import HEADS, DraftHead, DynamicTree
from emssd_compile.training.features import FrozenTarget
from tests.exactness.compiled import target
from tests.exactness.models import prompt

FAMILIES = ("llama", "gpt2", "bloom")
ROWS, WINDOW, NEW, STEPS = 3, 46, 12, 60
LENGTHS = (5, 1, 33, 20)  # one more than rows: the last one starts behind another
GROWING = DynamicTree(nodes=6, depth=3, width=2)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "recurrent": ("recurrent", {}, {"width": 2, "length": 3}),
    "medusa": ("medusa", {"num_heads": 2}, {"tree": (2, 2)}),
    "mlp": ("mlp", {"num_heads": 3}, {}),
    "eagle3": ("eagle3", {}, {"num_draft_tokens": 3}),
    "eagle3-tree": ("eagle3", {"draft_vocabulary": 150}, {"tree": GROWING}),
    "mtp-tree": ("mtp", {}, {"tree": GROWING}),
}


@functools.cache
def _frozen(family: str) -> FrozenTarget:
    return FrozenTarget(target(family, ROWS).model, len(LENGTHS), WINDOW)


@functools.cache
def _texts(family: str) -> list[list[int]]:
    """Prompts and what the target makes of them, up to a window."""
    return [[*prompt(n), *target(family, ROWS).reference(prompt(n), WINDOW - n)] for n in LENGTHS]


def _head(family: str, case: str) -> DraftHead:
    kind, sizes, options = CASES[case]
    of_kind = next(head for head in HEADS if head.kind == kind)
    frozen = _frozen(family)
    torch.manual_seed(0)
    config = of_kind.for_target(frozen.as_target(), **sizes).config
    head = of_kind(config, **options)
    head.prepare(frozen.as_target())
    return head


def _learn(head: DraftHead, family: str) -> None:
    """The texts by heart."""
    frozen, tokens = _frozen(family), torch.tensor(_texts(family))
    frozen.tap(head.taps)
    features, _ = frozen.read(tokens)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for ahead, logits in enumerate(head.rollout(features), 1):
            drafts, right = logits[:, : -1 - ahead].flatten(0, 1), tokens[:, 1 + ahead :].flatten()
            can_say = drafts.gather(1, right[:, None]).squeeze(1) > -torch.inf
            F.cross_entropy(drafts[can_say], right[can_say]).backward(retain_graph=True)
        optimizer.step()
    for parameter in head.parameters():
        parameter.grad = None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_models_own(family, case):
    of, prompts, expected = target(family, ROWS), [prompt(n) for n in LENGTHS], _texts(family)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 3, "max_new_tokens": NEW}
    plain = of.optimize(of.drafter("none"))
    drawn = plain.generate(prompts, **sampling)
    several = plain.generate(prompts[2:3], num_return_sequences=ROWS, **sampling)
    head = _head(family, case)
    lengths = []
    for is_trained in (False, True):
        if is_trained:
            _learn(head, family)
        fast = of.optimize(head, prefill_chunk=24)
        assert fast.generate(prompts, max_new_tokens=NEW) == [
            text[: n + NEW] for text, n in zip(expected, LENGTHS, strict=True)
        ]
        lengths.append(fast.stats.mean_acceptance_length)
        assert fast.stats.num_draft_tokens > 0
        assert fast.generate(prompts, **sampling) == drawn
        assert fast.generate(prompts[2:3], num_return_sequences=ROWS, **sampling) == several
    assert lengths[1] > max(1.5, lengths[0]), "it learned something, so accepted paths are decoded with, too"


def test_there_is_a_case_of_every_kind():
    assert {kind for kind, _, _ in CASES.values()} == {head.kind for head in HEADS}
