"""`deterministic=True`: in half precision the same call repeats to the bit, in steps of the same sizes."""

import random
import time
from dataclasses import replace

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import PromptLookup
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.requests import Request
from tests.exactness.models import build, prompt
from tests.export import toy
from tests.runtime.engines import ObservedStep, graph_engine, watch
from tests.runtime.tape import TapeDevice

ROWS, NEW = 4, 24
PROMPTS = [prompt(n) for n in (33, 5, 40, 17, 61, 2, 23)]
OTHERS = [prompt(n) for n in (7, 48, 11)]


def _perturb(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A clock by which every step takes a time of its own, and larger ones may be faster."""
    clock, now = random.Random(seed), 0.0

    def tell() -> float:
        nonlocal now
        now += clock.choice([1e-6, 1e-3, 1.0])
        return now

    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, tell)


@pytest.fixture(scope="module")
def compiled() -> OptimizedModel:
    model = build("llama").bfloat16()
    return emssd_compile.optimize(
        model, PromptLookup(4), max_batch=ROWS, max_length=96, backend="eager", prefill_chunk=32, deterministic=True
    )


def _fresh(compiled: OptimizedModel, *, deterministic: bool = True) -> OptimizedModel:
    """An object that shares nothing but the graph, which takes long to make."""
    return OptimizedModel(compiled.model, compiled._step, replace(compiled.options, deterministic=deterministic))


def _run(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], list[ObservedStep], torch.Tensor]:
    """Tokens, the steps as they were launched, and the keys that they left in the first row's cache."""
    steps = watch(engine)
    launch = engine.launcher.launch
    requests = [Request(i, torch.tensor(ids), NEW) for i, ids in enumerate(prompts)]
    list(engine.run(requests))
    assert engine.launcher.launch is launch
    keys = engine.tensors["k_cache_0"].clone()
    del engine.launcher.launch
    return [request.output for request in requests], [*steps], keys


def test_two_objects_and_two_clocks_give_the_same_bits(compiled, monkeypatch):
    found = []
    for seed in (1, 2):
        fast = _fresh(compiled)
        _perturb(monkeypatch, seed)
        fast.warmup()
        found.append(_run(fast._engine, PROMPTS))
    (tokens, steps, keys), (same_tokens, same_steps, same_keys) = found
    assert tokens == same_tokens
    assert steps == same_steps
    assert torch.equal(keys, same_keys)
    assert any(step.drafts > 0 for step in steps)


def test_a_clock_decides_otherwise(compiled, monkeypatch):
    """So the test above can fail: the same, without the option."""
    sizes = []
    for seed in (1, 2, 3):
        fast = _fresh(compiled, deterministic=False)
        _perturb(monkeypatch, seed)
        fast.warmup()
        sizes.append([step.sizes for step in _run(fast._engine, PROMPTS)[1]])
    assert not sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("kind", ["lag=0", "lag=1", "graphs"])
def test_what_was_decoded_before_changes_nothing(kind, compiled):
    fast = _fresh(compiled)
    engine = graph_engine(fast, 32, TapeDevice()) if kind == "graphs" else fast._engine
    engine.lag = int(kind != "lag=0")
    first = _run(engine, PROMPTS)
    for prompts in (OTHERS, PROMPTS[::-1]):
        _run(engine, prompts)
    again = _run(engine, PROMPTS)
    assert first[:2] == again[:2]


def test_an_artifact_keeps_the_choice(compiled, tmp_path, monkeypatch):
    toy.install(monkeypatch)
    for deterministic in (True, False):
        fast = _fresh(compiled, deterministic=deterministic)
        folder = tmp_path / str(deterministic)
        fast._export("toy", folder, False, True, False, label="red")
        loaded = emssd_compile.load(folder)
        assert loaded._engine.deterministic == loaded.manifest.deterministic == deterministic
        assert loaded._engine.is_measured != deterministic
