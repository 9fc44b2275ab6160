"""Draft heads of every kind, untrained and trained, for three families of targets: the tokens are the targets' own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch.nn import functional as F

import emssd_compile
from emssd_compile.decoder import Decoder
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
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.step.drafting import Target
from emssd_compile.step.options import RowOption
from emssd_compile.training.features import FrozenTarget
from tests.exactness.compiled import CAPACITY, target
from tests.exactness.models import prompt
from tests.zoo import toy_model

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

OFTEN = tuple(zip(itertools.cycle(FAMILIES), CASES, strict=False))
"""Tried each time: every case with one family, and so every family. The others if --long."""


@functools.cache
def _frozen(family: str) -> FrozenTarget:
    return FrozenTarget(target(family, ROWS).model, len(LENGTHS), WINDOW)


@functools.cache
def _texts(family: str) -> list[list[int]]:
    """Prompts and what the target makes of them, up to a window."""
    return [[*prompt(n), *target(family, ROWS).reference(prompt(n), WINDOW - n)] for n in LENGTHS]


def _expected(family: str) -> list[list[int]]:
    """Prompts with as many tokens as are decoded here."""
    return [text[: n + NEW] for text, n in zip(_texts(family), LENGTHS, strict=True)]


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


@functools.cache
def _drawn(family: str) -> tuple[list[list[int]], list[list[int]]]:
    """Of the prompts, and several texts of one of them, without drafts."""
    of = target(family, ROWS)
    plain = of.optimize(of.drafter("none"))
    return plain.generate(PROMPTS, **SAMPLING), plain.generate(PROMPTS[2:3], num_return_sequences=ROWS, **SAMPLING)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, marks=() if (family, case) in OFTEN else pytest.mark.long)
        for family in FAMILIES
        for case in CASES
    ],
)
def test_tokens_are_the_models_own(family, case):
    """Untrained and trained: the weights of a head change under a step that is compiled."""
    expected = _expected(family)
    drawn, several = _drawn(family)
    head = _head(family, case)
    fast = target(family, ROWS).optimize(head, prefill_chunk=24)
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert fast.stats.num_draft_tokens > 0
    untrained = fast.stats.mean_acceptance_length
    _learn(head, family)
    fast.stats.reset()
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert fast.stats.mean_acceptance_length > max(1.5, untrained), "accepted paths are decoded with, too"
    assert fast.generate(PROMPTS, **SAMPLING) == drawn
    assert fast.generate(PROMPTS[2:3], num_return_sequences=ROWS, **SAMPLING) == several


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
            parents = torch.arange(draft.tokens.shape[1]).expand_as(draft.tokens)
            parents = F.pad(parents if draft.parents is None else draft.parents, (0, missing))
            each = (F.pad(draft.tokens, (0, missing)), parents, draft.lengths[:, None])
            taken = [torch.where(turn == number, *pair) for pair in zip(each, taken or each, strict=True)]
        tokens, parents, lengths = taken
        return Draft(tokens, lengths.squeeze(1), gather_tensors(states), parents=parents)


FEW = ("recurrent", "block-tree", "mtp-modules")
"""What draws beams, attends both ways, and reads again: with them and early exit, all that an artifact has to carry."""


def _in_turn(family: str, cases: Sequence[str]) -> InTurn:
    """Heads, trained, and what else has a file of its own and no model to be captured."""
    heads = {case.replace("-", "_"): _head(family, case) for case in cases}
    for head in heads.values():
        _learn(head, family)
    suffix = SuffixLookup(4, corpus=Corpus(capacity_tokens=256))
    return InTurn(**heads, suffix=suffix, exit=EarlyExit(1, tree=(2, 1)))


@pytest.mark.parametrize(
    ("target_name", "cases"),
    [
        pytest.param("onnx", FEW, id="onnx-few"),
        *(pytest.param(name, tuple(CASES), marks=pytest.mark.long, id=name) for name in ("onnx", "aot", "inductor")),
    ],
)
def test_compiled_and_as_an_artifact_they_make_the_same_drafts(target_name, cases, tmp_path):
    """Several in one step, since compiling one takes long; all if --long."""
    eager, expected = _eager_in_turn(cases), _expected(FAMILIES[0])
    if target_name == "onnx":
        pytest.importorskip("onnxruntime")
    decoder: Decoder
    if target_name == "inductor":
        decoder = emssd_compile.optimize(eager.model, _in_turn(FAMILIES[0], cases), backend=target_name, **SIZES)
    else:
        with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # to be quick
            getattr(eager, f"export_{target_name}")(tmp_path / "artifact")
        decoder = emssd_compile.load(tmp_path / "artifact")
    for one in (eager, decoder):
        one.stats.reset()
        assert one.generate(PROMPTS, max_new_tokens=NEW) == expected
        assert one.stats.mean_acceptance_length > 1.5
    assert decoder.stats == eager.stats


@functools.cache
def _eager_in_turn(cases: tuple[str, ...]) -> OptimizedModel:
    family = FAMILIES[0]
    return emssd_compile.optimize(target(family, ROWS).model, _in_turn(family, cases), backend="eager", **SIZES)


@pytest.mark.long
def test_engines_are_built_of_steps_with_heads(tmp_path):
    """Of all of them in one step; their attention is decomposed, for these head sizes have no kernel of TensorRT's."""
    pytest.importorskip("tensorrt_rtx")
    model = toy_model(FAMILIES[0]).to(torch.float16)
    fast = emssd_compile.optimize(model, _in_turn(FAMILIES[0], tuple(CASES)), backend="eager", **SIZES)
    fast.export_tensorrt(tmp_path / "engine", compute_capabilities=["8.0"], attention="decomposed", check=False)
    assert (tmp_path / "engine" / "step.engine").stat().st_size > 2**20


def test_there_is_a_case_of_every_kind():
    assert {kind for kind, _, _ in CASES.values()} == {head.kind for head in HEADS}
