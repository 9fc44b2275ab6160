"""Draft heads of every kind and their like, untrained or with the texts by heart, and all of them in turn."""

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
    Hybrid,
    MarginalTree,
    ParallelDraftModel,
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
from tests.exactness.models import build, prompt
from tests.zoo import VOCABULARY

FAMILIES = ("llama", "gpt2", "bloom")
BATCHES = (3, 1, 8)
ROWS, WINDOW, NEW, STEPS = 3, 46, 12, 60
LENGTHS = (5, 1, 33, 20)  # one more than rows: the last one starts behind another
MASK = 7
PROMPTS = [prompt(n) for n in LENGTHS]
SIZES: dict[str, Any] = {"max_batch": ROWS, "max_length": CAPACITY, "layout": "packed", "deterministic": True}
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 3, "max_new_tokens": NEW}
GROWING = DynamicTree(nodes=6, depth=3, width=2)
DSPARK = {"markov_rank": 8, "has_confidence": True, "confidence_reads_token": True}
EAGLE_31 = {"normalises_taps": True, "feeds_on_normalised": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "recurrent": ("recurrent", {}, {"width": 2, "length": 3}),
    "medusa": ("medusa", {"num_heads": 2}, {"tree": (2, 2)}),
    "mlp": ("mlp", {"num_heads": 3}, {}),
    "block": ("block", {"num_layers": 1, "block_size": 4, **DSPARK}, {}),
    "block-tree": ("block", {"num_layers": 1, "block_size": 4}, {"tree": MarginalTree(nodes=6, width=2)}),
    "eagle3": ("eagle3", {}, {"num_draft_tokens": 3}),
    "eagle3-tree": ("eagle3", {"draft_vocabulary": 150, **EAGLE_31}, {"tree": GROWING}),
    "mtp-tree": ("mtp", {}, {"tree": GROWING}),
    "mtp-modules": ("mtp", {"num_modules": 2}, {}),
    "peagle": ("peagle", {"num_layers": 2}, {"num_draft_tokens": 3}),
}
OTHERS = ("suffix", "suffix-or-head", "parallel-model", "early-exit")
"""No heads: a lookup in what has been decoded, a lookup and a head, a model that was trained with masks, the target."""
FEW = ("recurrent", "block-tree", "mtp-modules", "suffix", "early-exit")
"""What draws beams, attends both ways, reads again, looks up and leaves early; no model that is captured."""


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


def prompts_for(rows: int) -> list[list[int]]:
    """One more than rows, some of them several times: one reads them for the others."""
    return [PROMPTS[index % len(PROMPTS)] for index in range(rows + 1)]


def make_drafter(family: str, case: str) -> Drafter:
    """Of `CASES` or `OTHERS`, with random weights, or nothing to look up yet."""
    if case == "suffix":
        return SuffixLookup(4, corpus=Corpus(capacity_tokens=1024, prompts=True))
    if case == "suffix-or-head":
        return Hybrid(SuffixLookup(3), make_head(family, "mtp-tree"))
    if case == "parallel-model":
        return ParallelDraftModel(build("gpt2"), MASK, 3)
    if case == "early-exit":
        return EarlyExit(1, tree=(2, 1))
    return make_head(family, case)


def make_head(family: str, case: str) -> DraftHead:
    kind, sizes, options = CASES[case]
    of_kind = next(head for head in HEADS if head.kind == kind)
    frozen = frozen_target(family)
    torch.manual_seed(0)
    config = of_kind.for_target(frozen.as_target(), **sizes).config
    head = of_kind(config, **options)
    head.prepare(frozen.as_target())
    return head


def teach(drafter: Drafter, family: str) -> None:
    """The texts by heart, if it has weights of its own to learn them with."""
    if isinstance(drafter, Hybrid):
        teach(drafter.second, family)
    elif isinstance(drafter, ParallelDraftModel):
        _teach_model(drafter, family)
    elif isinstance(drafter, DraftHead):
        learn(drafter, family)


def _teach_model(drafter: ParallelDraftModel, family: str) -> None:
    """What follows each beginning of a text, by the masks behind it."""
    count, beginnings = drafter.num_draft_tokens, list[list[int]]()
    right: list[list[int]] = []
    for text, length in zip(texts(family), LENGTHS, strict=True):
        for end in range(length, length + NEW - count):
            beginnings.append([*text[:end], *[MASK] * (count - 1), *[0] * (WINDOW - end - count + 1)])
            right.append([*range(end - 1, end + count - 1), *text[end : end + count]])
    ids, (places, tokens) = torch.tensor(beginnings), torch.tensor(right).split(count, 1)
    optimizer = torch.optim.Adam(drafter.model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = drafter.model(ids).logits.gather(1, places[:, :, None].expand(-1, -1, VOCABULARY))
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


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

    is_costly = reads_ahead = remembers_features = True

    def __init__(self, **held: Drafter) -> None:
        super().__init__()
        self.held = torch.nn.ModuleDict(held)
        self.any_rows = all(drafter.any_rows for drafter in held.values())
        self.writes_kv = any(drafter.writes_kv for drafter in held.values())
        self.num_draft_tokens = max(drafter.num_draft_tokens for drafter in held.values())
        self.max_depth = max(drafter.max_depth or drafter.num_draft_tokens for drafter in held.values())
        self.taps = tuple(dict.fromkeys(tap for drafter in held.values() for tap in drafter.taps))

    @property
    def _drafters(self) -> dict[str, Any]:
        return dict(self.held.items())

    def prepare(self, target: Target) -> None:
        for drafter in self._drafters.values():
            drafter.prepare(target)

    def options(self) -> dict[str, RowOption]:
        return {name: option for drafter in self._drafters.values() for name, option in drafter.options().items()}

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return gather_tensors({name: drafter.tensors(sizes) for name, drafter in self._drafters.items()})

    def host_tensors(self) -> dict[str, Tensor]:
        return gather_tensors({name: drafter.host_tensors() for name, drafter in self._drafters.items()})

    def ended(self, *request: Any) -> None:
        for drafter in self._drafters.values():
            drafter.ended(*request)

    def forward(self, context: DraftContext) -> Draft:
        turn = (context.known % len(self.held))[:, None]  # [B, 1]
        taken, states = list[Tensor](), {}
        for number, (name, drafter) in enumerate(self._drafters.items()):
            draft = drafter(replace(context, state=tensors_of(name, context.state)))
            states[name] = draft.state
            missing = self.num_draft_tokens - draft.tokens.shape[1]
            parents = torch.arange(draft.tokens.shape[1], device=turn.device).expand_as(draft.tokens)
            parents = F.pad(parents if draft.parents is None else draft.parents, (0, missing))
            each = (F.pad(draft.tokens, (0, missing)), parents, draft.lengths[:, None])
            pairs = zip(each, taken, strict=True) if taken else ()
            taken = [torch.where(turn == number, *pair) for pair in pairs] or [*each]
        tokens, parents, lengths = taken
        return Draft(tokens, lengths.squeeze(1), gather_tensors(states), parents=parents)


def in_turn(family: str, cases: Sequence[str]) -> InTurn:
    """All of these, trained."""
    drafters = {case.replace("-", "_"): make_drafter(family, case) for case in cases}
    for drafter in drafters.values():
        teach(drafter, family)
    return InTurn(**drafters)
