"""Compile each architecture once and each of its drafters once: that is what takes time, not decoding."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from emssd_compile.acceptance import TargetMatch
from emssd_compile.compiler import CompiledModel, compile_model, compile_step
from emssd_compile.drafters import Drafter, DraftModel, MultiCandidate, NoDrafter, PromptLookup, TargetInitialized
from emssd_compile.layouts import LAYOUTS
from emssd_compile.logits import make_processors
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.options import CompileOptions
from emssd_compile.probes import make_probes
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import tree_nodes
from tests.exactness.drafters import Oracle, OracleTree, Rubbish
from tests.exactness.models import Reference, build, prompt

ROWS, CAPACITY, K = 8, 96, 4
NEW_TOKENS = 20
LENGTHS = (1, 2, 3, 5, 7, 11, 17, 19, 23, 33, 40, 48, 61, 64, 70)
DRAFTERS = ("none", "prompt-lookup", "draft-model", "rubbish", "always-right", "sometimes-wrong", "always-wrong")
TREES = (
    *("fixed-tree", "random-tree", "rubbish-tree", "always-right-tree"),
    *("draft-model-tree", "multi-candidate"),
)
SHAPE = (0, 0, 1, 2, 1, 3, 3, 6, 4, 9, 0)


class Target:
    """A model of `tests.exactness.models` at level L2, and its own greedy tokens.

    Args:
        architecture: its name.
        rows: B.
        overrides: fields of its configuration.
    """

    def __init__(self, architecture: str, rows: int = ROWS, **overrides: Any) -> None:
        self.model = build(architecture, **overrides)
        self.reference = Reference(self.model)
        self.rows = rows

        self._compiled: dict[int, CompiledModel] = {}

    @property
    def compiled(self) -> CompiledModel:
        """For chains."""
        return self._compile(0)

    def _compile(self, tree_nodes: int) -> CompiledModel:
        if tree_nodes not in self._compiled:
            self._compiled[tree_nodes] = compile_model(self.model, BatchShape(self.rows, CAPACITY, tree_nodes))
        return self._compiled[tree_nodes]

    def texts(self) -> list[list[int]]:
        """Every prompt of `LENGTHS` with the tokens that follow it."""
        return [[*prompt(n), *self.reference(prompt(n), NEW_TOKENS)] for n in LENGTHS]

    def drafter(self, name: str) -> Drafter:
        """A drafter of `DRAFTERS`, with at most `K` drafts."""
        if name == "none":
            return NoDrafter()
        if name == "prompt-lookup":
            return PromptLookup(K)
        if name == "draft-model":
            return DraftModel(self.model, K)
        if name == "draft-model-tree":
            return DraftModel(self.model, tree=(3, 1, 2))
        if name == "multi-candidate":
            return MultiCandidate(self.model, (3, 1, 2), threshold=0.05)
        if name == "target-initialized":
            return TargetInitialized(self.model, 4, 3, threshold=0.0005)
        if name == "rubbish":
            return Rubbish(K)
        if name == "rubbish-tree":
            return OracleTree(Rubbish(K), 7)
        if name.endswith("tree"):
            chain = self.drafter("always-right" if name == "always-right-tree" else "sometimes-wrong")
            return OracleTree(chain, len(SHAPE), None if name == "random-tree" else SHAPE)
        wrong = {"always-right": 0, "sometimes-wrong": 2, "always-wrong": 7}[name]
        return Oracle(self.texts(), CAPACITY, K, wrong_of_seven=wrong, ragged=name == "sometimes-wrong")

    def optimize(
        self, drafter: Drafter, *, prefill_chunk: int = 1, layout: str = "packed", drafts_for_few: bool = True
    ) -> OptimizedModel:
        """What `emssd_compile.optimize` does, without compiling the model again; artifacts do not draft for few."""
        compiled = self._compile(tree_nodes(drafter))
        if drafter.taps:
            compiled = compiled.tapped(drafter.taps)
        drafter.prepare(compiled.target(self._disturbed))
        prefill_chunk = max(prefill_chunk, self.rows * (drafter.num_draft_tokens + 1))
        parts = TargetMatch(), drafter, LAYOUTS[layout].policy(), make_processors(()), make_probes(())
        step = compile_step(compiled, *parts, drafts_for_few=drafts_for_few)
        options = CompileOptions(self.rows, CAPACITY, "eager", layout, prefill_chunk)
        return OptimizedModel(self.model, step, options)

    def _disturbed(self, model: nn.Module, *, tree_nodes: int = 0) -> CompiledModel:
        """The target with noise on its weights: a draft model that is right now and then. Others are as they are."""
        if model is not self.model:
            return compile_model(model, BatchShape(self.rows, CAPACITY, tree_nodes))
        compiled = self._compile(tree_nodes)
        disturbed = replace(compiled, graph_module=copy.deepcopy(compiled.graph_module))
        with torch.no_grad():
            for parameter in disturbed.graph_module.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 0.05)
        return disturbed


def rechunked(fast: OptimizedModel, prefill_chunk: int) -> OptimizedModel:
    """The same step with another size of prefill chunks, or the smallest there is."""
    least = fast.options.max_batch * (fast.drafter.num_draft_tokens + 1)
    options = replace(fast.options, prefill_chunk=max(prefill_chunk, least))
    return OptimizedModel(fast.model, fast._step, options)


@functools.lru_cache(maxsize=2)
def target(architecture: str, rows: int = ROWS, **overrides: Any) -> Target:
    """One target at a time is kept: tests go through the architectures one by one."""
    return Target(architecture, rows, **overrides)


def assert_exact(
    fast: OptimizedModel, reference: Reference, prompts: list[list[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """Compare with the reference, token for token; returns the new tokens of each prompt."""
    eos, least = options.get("eos_token_id", ()), options.get("min_new_tokens", 0)
    expected = [reference(ids, max_new_tokens, eos, least) for ids in prompts]
    outputs = fast.generate(prompts, max_new_tokens=max_new_tokens, **options)
    assert outputs == [[*ids, *new] for ids, new in zip(prompts, expected, strict=True)]
    return expected
