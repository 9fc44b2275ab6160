"""Inductor: one function for all sizes; its cache on disk serves a second start, and never what other sources made."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from emssd_compile.drafters import PromptLookup
from emssd_compile.lowering import inductor
from tests.passes.graphs import BATCH, VOCABULARY, step_of

STARTS = """
import json, sys, time
import torch
from torch._dynamo.utils import counters
from emssd_compile.lowering import inductor, unbacked
from tests.passes.graphs import step_of
from emssd_compile.drafters import NoDrafter

if sys.argv[1] != "as it is":
    unbacked.source_hash = lambda: sys.argv[1]
step = step_of(NoDrafter())
run = inductor.lower(step)
inputs = []
for node in step.graph.nodes:
    if node.op == "placeholder":
        value = node.meta["val"]
        sizes = [2 if str(node.target).endswith("_slots") else int(size) for size in value.shape]
        inputs.append(torch.zeros(sizes, dtype=value.dtype))
started = time.perf_counter()
with torch.no_grad():
    run(*inputs)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "hits": counters["inductor"]["fxgraph_cache_hit"]}))
"""


def _start(cache: Path, sources: str = "as it is") -> dict[str, float]:
    """Compile a small step in a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STARTS, sources]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_second_start_compiles_from_the_cache_unless_the_sources_of_the_ops_changed(tmp_path):
    first, second, changed = _start(tmp_path), _start(tmp_path), _start(tmp_path, "other sources")
    assert (first["hits"], second["hits"], changed["hits"]) == (0, 1, 0)
    assert second["seconds"] <= 0.5 * first["seconds"]


@functools.cache
def _steps() -> tuple[fx.GraphModule, inductor.InductorStep]:
    step = step_of(PromptLookup(3))
    return step, inductor.lower(step)


def _inputs(step: fx.GraphModule, sizes: dict[str, int]) -> list[torch.Tensor]:
    """Two rows that decode, with three drafts and none, and one that reads its prompt; the KV caches are empty."""
    state = {
        "history": torch.randint(VOCABULARY, (BATCH.rows, BATCH.capacity)),
        "known": torch.tensor([9, 20, 4]),
        "lengths": torch.tensor([8, 0, 3]),
        "draft_lengths": torch.tensor([3, 0, 0]),
        "draft_tokens": torch.randint(VOCABULARY, (BATCH.rows, 3), generator=torch.Generator().manual_seed(1)),
        "active": torch.ones(BATCH.rows, dtype=torch.bool),
        "limits": torch.full((BATCH.rows,), 50),
    }
    inputs = []
    for node in step.graph.nodes:
        if node.op == "placeholder":
            name, value = str(node.target), node.meta["val"]
            shape = [] if name in sizes else [int(size) for size in value.shape]
            new = torch.arange(sizes[name]) if name in sizes else torch.zeros(shape, dtype=value.dtype)
            inputs.append(state.get(name, new))
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(40, 6, 9, 31), (25, 25, 25, 25), (5, 4, 1, 2), (1, 1, 1, 1), (2, 1, 7, 1)])
def test_one_function_serves_sizes_that_differ_and_sizes_that_agree(sizes):
    step, compiled = _steps()
    inputs = _inputs(step, dict(zip(("token_range", "logit_range", "draft_range", "row_range"), sizes, strict=True)))
    expected = step(*(value.clone() for value in inputs))
    results = compiled(*inputs)
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
