"""Draft heads of every kind, untrained or with the texts by heart, and a drafter that takes them in turn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emssd_compile.drafters import (
    HEADS,
    Corpus,
    Draft,
    DraftContext,
    Drafter,
    DraftHead,
    DynamicTree,
    EarlyExit,
    MarginalTree,
    PartSizes,
    SuffixLookup,
    TensorSpec,
    gather_tensors,
    tensors_of,
)
from emssd_compile.step.drafting import Target
from emssd_compile.step.options import RowOption
from emssd_compile.training.features import FrozenTarget
from tests.exactness.compiled import CAPACITY, target
from tests.exactness.models import prompt

FAMILIES = ("llama", "gpt2", "bloom")
ROWS, WINDOW, NEW, STEPS = 3, 46, 12, 60
LENGTHS = (5, 1, 33, 20)  # one more than rows: the last one starts behind another
PROMPTS = [prompt(n) for n in LENGTHS]
SIZES: dict[str, Any] = {"max_batch": ROWS, "max_length": CAPACITY, "layout": "packed", "deterministic": True}
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 3, "max_new_tokens": NEW}
GROWING = DynamicTree(nodes=6, depth=3, width=2)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "recurrent": ("recurrent", {}, {"width": 2, "length": 3}),
    "medusa": ("medusa", {"num_heads": 2}, {"tree": (2, 2)}),
    "mlp": ("mlp", {"num_heads": 3}, {}),
    "block": ("block", {"num_layers": 1, "block_size": 4, "markov_rank": 8}, {}),
    "block-tree": ("block", {"num_layers": 1, "block_size": 4}, {"tree": MarginalTree(nodes=6, width=2)}),
    "eagle3": ("eagle3", {}, {"num_draft_tokens": 3}),
    "eagle3-tree": ("eagle3", {"draft_vocabulary": 150}, {"tree": GROWING}),
    "mtp-tree": ("mtp", {}, {"tree": GROWING}),
    "mtp-modules": ("mtp", {"num_modules": 2}, {}),
    "peagle": ("peagle", {"num_layers": 2}, {"num_draft_tokens": 3}),
}
FEW = ("recurrent", "block-tree", "mtp-modules")
"""What draws beams, attends both ways, and reads again: with them and early exit, all that an artifact has to carry."""


@functools.cache
def frozen_target(family: str) -> FrozenTarget:
    return FrozenTarget(target(family, ROWS).model, len(LENGTHS), WINDOW)


@functools.cache
def texts(family: str) -> list[list[int]]:
    """Prompts and what the target makes of them, up to a window."""
    return [[*prompt(n), *target(family, ROWS).reference(prompt(n), WINDOW - n)] for n in LENGTHS]


def expected_texts(family: str) -> list[list[int]]:
    """Prompts with as many tokens as are decoded here."""
    return [text[: n + NEW] for text, n in zip(texts(family), LENGTHS, strict=True)]


def make_head(family: str, case: str) -> DraftHead:
    kind, sizes, options = CASES[case]
    of_kind = next(head for head in HEADS if head.kind == kind)
    frozen = frozen_target(family)
    torch.manual_seed(0)
    config = of_kind.for_target(frozen.as_target(), **sizes).config
    head = of_kind(config, **options)
    head.prepare(frozen.as_target())
    return head


def learn(head: DraftHead, family: str) -> None:
    """The texts by heart."""
    frozen, tokens = frozen_target(family), torch.tensor(texts(family))
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


class InTurn(Drafter):
    """Holds drafters; each drafts in every step, and their drafts are taken in turn, by the length of the text."""

    is_costly = reads_ahead = writes_kv = must_run = True

    def __init__(self, **held: Drafter) -> None:
        super().__init__()
        self.held = torch.nn.ModuleDict(held)
        self.num_draft_tokens = max(drafter.num_draft_tokens for drafter in held.values())
        self.max_depth = max(drafter.max_depth or drafter.num_draft_tokens for drafter in held.values())
        self.taps = tuple(dict.fromkeys(tap for drafter in held.values() for tap in drafter.taps))

    def prepare(self, target: Target) -> None:
        for drafter in self.held.values():
            drafter.prepare(target)  # type: ignore[operator]

    def options(self) -> dict[str, RowOption]:
        return {name: option for drafter in self.held.values() for name, option in drafter.options().items()}  # type: ignore[operator]

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return gather_tensors({name: drafter.tensors(sizes) for name, drafter in self.held.items()})  # type: ignore[operator]

    def forward(self, context: DraftContext) -> Draft:
        turn = (context.known % len(self.held))[:, None]  # [B, 1]
        taken, states = list[Tensor](), {}
        for number, (name, drafter) in enumerate(self.held.items()):
            draft = drafter(replace(context, state=tensors_of(name, context.state)))
            states[name] = draft.state
            missing = self.num_draft_tokens - draft.tokens.shape[1]
            parents = torch.arange(draft.tokens.shape[1], device=turn.device).expand_as(draft.tokens)
            parents = F.pad(parents if draft.parents is None else draft.parents, (0, missing))
            each = (F.pad(draft.tokens, (0, missing)), parents, draft.lengths[:, None])
            taken = [torch.where(turn == number, *pair) for pair in zip(each, taken or each, strict=True)]
        tokens, parents, lengths = taken
        return Draft(tokens, lengths.squeeze(1), gather_tensors(states), parents=parents)


def in_turn(family: str, cases: Sequence[str]) -> InTurn:
    """Heads, trained, and what else has a file of its own and no model to be captured."""
    heads = {case.replace("-", "_"): make_head(family, case) for case in cases}
    for head in heads.values():
        learn(head, family)
    suffix = SuffixLookup(4, corpus=Corpus(capacity_tokens=256))
    return InTurn(**heads, suffix=suffix, exit=EarlyExit(1, tree=(2, 1)))
