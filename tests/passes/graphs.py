"""Small models for the tests of the passes, and what a pass test asks of their graphs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from emssd_compile import passes
from emssd_compile.acceptance import GreedyMatch, Rule
from emssd_compile.capture import capture
from emssd_compile.compiler import CompiledModel, CompiledStep, compile_model, compile_step
from emssd_compile.drafters import Draft, DraftContext, Drafter, PromptLookup
from emssd_compile.passes import Level
from emssd_compile.passes.fuse_step import FuseStep
from emssd_compile.passes.graph import caches, inputs, placeholder
from emssd_compile.passes.manager import Pass, PassManager, PassRecord
from emssd_compile.policies import AllDrafts, LengthPolicy
from emssd_compile.probes import Probe
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import tree_nodes

VOCABULARY, HIDDEN, HEADS, LONGEST = 32, 16, 4, 64

Local = Callable[["TinyModel", Tensor, Tensor], Tensor]
"""(model, hidden [1, T, H], token ids [1, T]) -> hidden [1, T, H]"""
Attend = Callable[["TinyModel", Tensor, Tensor, Tensor], Tensor]
"""(model, queries [1, Hq, T, D], keys, values [1, Hkv, T, D]) -> [1, Hq, T, D]"""


class TinyModel(nn.Module):
    """Embedding, perhaps one attention, a function of the test's, LM head.

    `table`, `tril` and `band30` are buffers for the test's function.

    Args:
        local: applied to the hidden states.
        attend: what the attention computes; None leaves attention out.
        kv_heads: heads of keys and values.
    """

    table: Tensor
    tril: Tensor
    band30: Tensor

    def __init__(self, local: Local | None = None, attend: Attend | None = None, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.local, self.attend, self.kv_heads = local, attend, kv_heads
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        head_size = HIDDEN // HEADS
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n * head_size) for n in (HEADS, kv_heads, kv_heads))
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        places = torch.arange(LONGEST)
        self.register_buffer("table", torch.randn(LONGEST, HIDDEN))
        self.register_buffer("tril", (places <= places[:, None]))
        self.register_buffer("band30", (places <= places[:, None]) & (places > places[:, None] - 30))
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        if self.attend is not None:
            heads = [
                layer(hidden).unflatten(-1, (n, -1)).transpose(1, 2)
                for layer, n in ((self.q, HEADS), (self.k, self.kv_heads), (self.v, self.kv_heads))
            ]
            hidden = hidden + self.attend(self, *heads).transpose(1, 2).flatten(2)
        return self.lm_head(hidden if self.local is None else self.local(self, hidden, input_ids))


def apply(graph_module: fx.GraphModule, *steps: Pass) -> list[PassRecord]:
    """Run passes as the manager does, without a level's verifier; what each did."""
    manager = PassManager(fake_mode_of(graph_module))
    for step in steps:
        manager._run(step, "test", graph_module)
    return manager.records


def fake_mode_of(graph_module: fx.GraphModule) -> FakeTensorMode:
    """That of a graph's inputs."""
    values = (node.meta.get("val") for node in inputs(graph_module.graph))
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def calls(graph_module: fx.GraphModule, op: Any) -> list[fx.Node]:
    """The calls of an op, in order."""
    return [*graph_module.graph.find_nodes(op="call_function", target=op)]


def capture_and_apply(model: nn.Module, *steps: Pass) -> tuple[fx.GraphModule, list[PassRecord]]:
    """The captured graph of `model` after `steps`."""
    graph_module = capture(model)
    return graph_module, apply(graph_module, *steps)


def ops(graph_module: fx.GraphModule) -> Counter[str]:
    """How often each op stands in a graph, by its name without the namespace: `{"linear": 2}`."""
    calls = (n.target for n in graph_module.graph.nodes if n.op == "call_function")
    return Counter(target._opname if isinstance(target, torch._ops.OpOverload) else target.__name__ for target in calls)


def run(graph_module: fx.GraphModule, tokens: int, positions: Tensor | None = None) -> Tensor:
    """What a graph of level L0 or L1 gives for `tokens` random token ids."""
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        result: Tensor = graph_module(ids, torch.arange(tokens)[None] if positions is None else positions)
    return result


def eager(model: nn.Module, tokens: int) -> Tensor:
    """What the model itself gives for the ids of `run`."""
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        result: Tensor = model(ids)
    return result


BATCH = BatchShape(rows=3, capacity=LONGEST)


def causal(model: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention, key/value heads repeated by `enable_gqa`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def at_level(model: nn.Module, *levels: Callable[[FakeTensorMode], Level]) -> tuple[fx.GraphModule, PassManager]:
    """The graph of `model` after the levels that the given functions make."""
    graph_module = capture(model)
    fake_mode = placeholder(graph_module.graph, "input_ids").meta["val"].fake_mode
    manager = PassManager(fake_mode)
    manager.apply(graph_module, [level(fake_mode) for level in levels])
    return graph_module, manager


def canonical(model: nn.Module) -> tuple[fx.GraphModule, PassManager]:
    """Level L1 of `model`."""
    return at_level(model, lambda _: passes.captured(), lambda _: passes.canonical(BATCH))


def unpadded(model: nn.Module, batch: BatchShape = BATCH) -> tuple[fx.GraphModule, PassManager]:
    """Level L2 of `model`."""
    return at_level(
        model, lambda _: passes.captured(), lambda _: passes.canonical(batch), lambda m: passes.unpadded(batch, m)
    )


def run_packed(graph_module: fx.GraphModule, rows: list[Tensor], committed: list[Tensor]) -> tuple[Tensor, ...]:
    """What a level-L2 graph gives for `rows` of new tokens [n] behind `committed` tokens [m]: hidden states and logits,
    and what is tapped.

    The committed tokens are fed first, in a step of their own, to fill the caches.
    """
    held = {n: torch.zeros([int(s) for s in value.shape]) for n, value in caches(graph_module.graph).items()}
    lengths = torch.zeros(BATCH.rows, dtype=torch.int64)
    results: tuple[Tensor, ...] = ()
    for fed in (committed, rows):
        counts = torch.tensor([len(row) for row in fed])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        row_ids = torch.arange(BATCH.rows).repeat_interleave(counts)
        positions = torch.arange(int(counts.sum())) - offsets[row_ids] + lengths[row_ids]
        with torch.no_grad():
            results = graph_module(
                torch.cat(fed), positions, row_ids, offsets, lengths, torch.arange(len(row_ids)), *held.values()
            )
        lengths = lengths + counts
    return results


ROWS = [torch.tensor([7, 3, 9]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
COMMITTED = [torch.tensor([4, 4]), torch.tensor([5]), torch.tensor([2, 8, 6, 30, 11])]
"""A ragged step for `run_packed`: one row feeds nothing."""


def model_with_attention() -> TinyModel:
    """Learned positions and one attention with grouped heads."""
    return TinyModel(lambda m, x, ids: x + m.table[torch.arange(x.shape[1])], attend=causal, kv_heads=2)


def alone(model: nn.Module) -> Tensor:
    """The model's logits of the tokens of `ROWS`, each row by itself, without a cache."""
    with torch.no_grad():
        whole = [model(torch.cat(parts)[None])[0] for parts in zip(COMMITTED, ROWS, strict=True)]
    return torch.cat([logits[len(logits) - len(new) :] for logits, new in zip(whole, ROWS, strict=True)])


def step_of(drafter: Drafter, rule: Rule | None = None) -> fx.GraphModule:
    """The step graph of the tiny model with a drafter, of trees too, and a rule, else greedy matching."""
    batch = replace(BATCH, tree_nodes=tree_nodes(drafter))
    graph_module, manager = unpadded(model_with_attention(), batch)
    level = passes.step(FuseStep(batch, rule or GreedyMatch(), drafter, AllDrafts(), manager.fake_mode))
    return manager.apply(graph_module, (level,))


@functools.cache
def compiled_model() -> CompiledModel:
    """Level L2 of the tiny model, made once."""
    torch.manual_seed(0)
    return compile_model(model_with_attention(), BATCH)


def step_with(
    drafter: Drafter | None = None,
    rule: Rule | None = None,
    policy: LengthPolicy | None = None,
    probe: Probe | None = None,
) -> CompiledStep:
    """The step of `compiled_model` with these parts, else prompt lookup, greedy matching and all drafts."""
    parts = (rule or GreedyMatch(), drafter or PromptLookup(2), policy or AllDrafts())
    return compile_step(compiled_model(), *parts, probes=() if probe is None else (probe,))


class Scripted(Drafter):
    """Drafts the same tokens for every row."""

    def __init__(self, tokens: list[int], length: int | None = None) -> None:
        super().__init__()
        self.tokens, self.length = tokens, len(tokens) if length is None else length
        self.num_draft_tokens = len(tokens)

    def forward(self, context: DraftContext) -> Draft:
        tokens = torch.tensor(self.tokens).expand(len(context.known), -1)
        return Draft(tokens, torch.full_like(context.known, self.length))


class ScriptedTree(Scripted):
    """Drafts the same tree for every row."""

    def __init__(self, tokens: list[int], parents: list[int], max_depth: int, length: int | None = None) -> None:
        super().__init__(tokens, length)
        self.parents, self.max_depth = parents, max_depth

    def forward(self, context: DraftContext) -> Draft:
        draft = super().forward(context)
        return replace(draft, parents=torch.tensor(self.parents).expand(draft.tokens.shape))


def returned(step: fx.GraphModule) -> dict[str, fx.Node]:
    """What a step graph returns, by name."""
    results = step.graph.output_node().args[0]
    assert isinstance(results, dict)
    return results
