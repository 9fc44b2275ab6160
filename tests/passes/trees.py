"""Attention over draft trees as a graph of its own, and a step of random trees for it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from emssd_compile.ops import append_kv, ragged_attention
from emssd_compile.passes.graph import call, fresh_index
from tests.ops.ragged import Batch, Heads, make_batch, with_trees

HEADS = Heads(num_heads=4, num_kv_heads=2, head_size=8, value_size=8)
ROWS = [(17, 40), (6, 0), (0, 33), (0, 0), (0, 9), (5, 1), (0, 0)]
"""Committed and new tokens: trees of more than a word, one token, rows without any."""
TAIL = 3
LAYERS: tuple[dict[str, object], ...] = (
    {},
    {},
    {"softcap": 2.0, "window": 3},
    {"alibi_slopes": "per_head"},
    {"chunk": 8, "window": 5},
    {"sinks": "per_head"},
)


def tree_batch() -> Batch:
    """`ROWS` as random trees; their tokens are in the caches, and what no token has written there is NaN."""
    return with_trees(make_batch(ROWS, HEADS, tail=TAIL))


def step_inputs(batch: Batch) -> dict[str, Tensor]:
    """What `tree_graph` takes: the tokens of the step are not in the caches yet, and not the same in all layers."""
    counts = batch.offsets.diff()
    rows, live = len(counts), int(batch.offsets[-1])
    row = torch.arange(rows).repeat_interleave(counts)
    slots = torch.arange(live) - batch.offsets[row] + batch.lengths[row]
    nothing = torch.zeros(len(batch.q) - live, dtype=torch.int64)
    ancestors = batch.options["ancestors"]
    assert isinstance(ancestors, Tensor)
    generator = torch.Generator().manual_seed(1)
    found = {
        "q": batch.q,
        "k": torch.randn(len(batch.q), HEADS.num_kv_heads, HEADS.head_size, generator=generator),
        "v": torch.randn(len(batch.q), HEADS.num_kv_heads, HEADS.value_size, generator=generator),
        "row_ids": torch.cat([row, nothing + rows]),
        "slots": torch.cat([slots, nothing]),
        "offsets": batch.offsets,
        "lengths": batch.lengths,
        "positions": batch.positions,
        "ancestors": ancestors,
    }
    for layer in range(len(LAYERS)):
        found |= {f"k_cache_{layer}": batch.k_cache.clone(), f"v_cache_{layer}": batch.v_cache.clone()}
    return found


def tree_graph(example: dict[str, Tensor]) -> tuple[fx.GraphModule, FakeTensorMode]:
    """One append and one attention for each of `LAYERS`, any number of tokens; returns `out_<layer>` by name."""
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    tokens = fresh_index(fake_mode, torch.device("cpu")).shape[0]
    root, values = nn.Module(), torch.tensor([0.5, 0.25, 0.125, 0.0625])
    root.register_buffer("per_head", values)
    graph, nodes = fx.Graph(), {}
    for name, value in example.items():
        is_packed = len(value) == len(example["q"])
        with fake_mode:
            fake = torch.empty((tokens if is_packed else len(value), *value.shape[1:]), dtype=value.dtype)
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = fake
    per_head = graph.get_attr("per_head")
    per_head.meta["val"] = fake_mode.from_tensor(values, static_shapes=True)
    given = {"per_head": per_head}
    results = {}
    for layer, options in enumerate(LAYERS):
        kwargs = {name: given.get(value, value) for name, value in options.items()}  # type: ignore[call-overload]
        caches = nodes[f"k_cache_{layer}"], nodes[f"v_cache_{layer}"]
        call(graph, append_kv, *caches, *(nodes[name] for name in ("k", "v", "row_ids", "slots")))
        rows = (nodes[name] for name in ("offsets", "lengths", "positions"))
        results[f"out_{layer}"] = call(
            graph, ragged_attention, nodes["q"], *caches, *rows, scale=0.35, ancestors=nodes["ancestors"], **kwargs
        )
    graph.output(results)
    return fx.GraphModule(root, graph), fake_mode


def tiled_inputs(inputs: dict[str, Tensor], width: int, spare_slots: int = 1) -> dict[str, Tensor]:
    """The inputs of the tiled graph, with tiles of `width` queries, and caches with slots to spare."""

    def tiled(name: str, value: Tensor) -> Tensor:
        is_cache = "_cache_" in name
        if not is_cache:
            return value
        return nn.functional.pad(value.transpose(1, 2), (0, 0, 0, spare_slots), value=torch.nan).contiguous()

    return {name: tiled(name, value) for name, value in inputs.items()} | {"row_range": torch.arange(width)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same for live tokens; NaN where they are."""
    for layer in range(len(LAYERS)):
        mine, theirs = found[f"out_{layer}"], expected[f"out_{layer}"]
        torch.testing.assert_close(mine[:-TAIL], theirs[:-TAIL], rtol=1e-5, atol=1e-5, equal_nan=True)


def spread(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """NaN in all of a head where one of its values is not finite: how far it goes there, forms need not agree."""
    return {
        name: torch.where(value.isfinite().all(-1, keepdim=True), value, torch.nan) for name, value in results.items()
    }


def break_draft(given: dict[str, Tensor]) -> None:
    """Let a draft in the middle of the largest tree overflow, in a value of one of its heads."""
    given["v"][20, 0, 3] = torch.inf
