"""Small models for the tests of the passes, and what a pass test asks of their graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from emssd_compile.capture import capture
from emssd_compile.passes.manager import Pass, PassManager, PassRecord
from emssd_compile.passes.graph import placeholder

VOCABULARY, HIDDEN, HEADS, LONGEST = 32, 16, 4, 64

Local = Callable[["TinyModel", Tensor, Tensor], Tensor]
"""(model, hidden [1, T, H], token ids [1, T]) -> hidden [1, T, H]"""
Attend = Callable[["TinyModel", Tensor, Tensor, Tensor], Tensor]
"""(model, queries [1, Hq, T, D], keys, values [1, Hkv, T, D]) -> [1, Hq, T, D]"""


class TinyModel(nn.Module):
    """Embedding, perhaps one attention, a function of the test's, LM head.

    Args:
        local: applied to the hidden states.
        attend: what the attention computes; None leaves attention out.
        kv_heads: heads of keys and values.
    """

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
    manager = PassManager(placeholder(graph_module.graph, "input_ids").meta["val"].fake_mode)
    for step in steps:
        manager._run(step, "test", graph_module)
    return manager.records


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
