"""`memory=` and `kv_tokens=` of `optimize`: what is chosen, what is said of it, and what is refused before any work."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import emssd_compile
from emssd_compile.errors import CapacityError, OptionError
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime import memory
from emssd_compile.step.tensor_spec import TensorSpec
from tests.exactness.models import Reference, prompt
from tests.export.subjects import LastBigram, Small, drafter
from tests.zoo import VOCABULARY, toy_model

LIMIT = 131_072


def _optimized(name: str = "lookup", **options: Any) -> OptimizedModel:
    given: dict[str, Any] = {"max_batch": 2, "max_length": 200, "backend": "eager", "layout": "packed", **options}
    return emssd_compile.optimize(Small(), drafter(name), **given)


def _allocated(fast: OptimizedModel) -> int:
    return sum(tensor.nbytes for name, tensor in fast._engine.tensors.items() if "_cache_" in name)


@pytest.fixture
def long_model() -> torch.nn.Module:
    """Of two layers, and as many positions as models of 2024 have."""
    config = toy_model("llama").config
    config.max_position_embeddings = LIMIT
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_of_many_positions_simply_works(monkeypatch, long_model):
    """Slabs would take more than there is, of a real model a hundred gigabytes: half of what there is is taken."""
    available = 64 << 20
    monkeypatch.setattr(memory, "available_memory", lambda device: available)
    fast = emssd_compile.optimize(long_model, backend="eager")
    assert fast._engine.capacity == LIMIT
    assert available // 4 < _allocated(fast) <= available // 2
    assert fast.explain().memory.startswith("a pool of ")
    prompts = [prompt(n) for n in (20, 3, 70)]
    reference = Reference(long_model)
    assert fast.generate(prompts, max_new_tokens=12) == [[*ids, *reference(ids, 12)] for ids in prompts]
    with pytest.raises(CapacityError, match=r"131000 new ones take 2048 blocks of 64 tokens, and the pool has \d+,"):
        fast.generate([prompt(70)], max_new_tokens=131_000)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1 << 40)
    assert emssd_compile.optimize(long_model, backend="eager").explain().memory.startswith("slabs of 131072 tokens")


@pytest.fixture(scope="module")
def windowed() -> OptimizedModel:
    """Of one layer that sees 30 tokens, and one that sees all."""
    model = toy_model("gemma2", max_position_embeddings=4096)
    sizes: dict[str, Any] = {"max_batch": 2, "max_length": 4096, "prefill_chunk": 100}
    return emssd_compile.optimize(model, "none", backend="eager", **sizes)


def _in_memory(fast: OptimizedModel, **options: Any) -> OptimizedModel:
    return OptimizedModel(fast.model, fast._step, replace(fast.options, **options))


def test_a_layer_with_a_window_takes_no_more_than_that_and_a_chunk(windowed):
    """Of 4096 slots a row, 192: 30 and 99, in whole blocks."""
    slabs = _in_memory(windowed, memory="slab")
    whole = _allocated(slabs) // 2
    assert _allocated(windowed) == whole + whole * 192 // 4096
    assert windowed.explain().memory == (
        f"slabs of 4096 tokens for each of 2 rows, {whole / 2**20:.1f} MiB; and rings of 192 slots for each of 2 rows "
        f"in layers that see no further than a window, {whole * 192 / 4096 / 2**20:.1f} MiB"
    )
    long = torch.randint(2, VOCABULARY, (900,), generator=torch.Generator().manual_seed(1))
    prompts = [long.tolist(), prompt(5)]
    assert windowed.generate(prompts, max_new_tokens=12) == slabs.generate(prompts, max_new_tokens=12)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"memory": "slab"}, "slabs of 4096 tokens"),
        ({"memory": "paged"}, "a pool of 128 blocks"),
        ({"kv_tokens": 128}, "a pool of 2 blocks"),
        ({"prefix_cache": True}, "a pool of 128 blocks"),
        ({"prefill_chunk": 4096}, "slabs of 4096 tokens"),  # a ring for that would be larger
    ],
)
def test_all_is_kept_where_that_is_asked_for_or_takes_no_more(windowed, options, kind):
    fast = _in_memory(windowed, **options)
    assert fast.explain().memory.startswith(kind)
    assert not fast._engine.variant.signature.with_role("ring")


def test_on_a_gpu_slabs_are_kept_where_they_fit(monkeypatch):
    """The fastest form of attention there reads nothing else."""
    slabs = {"k_cache_0": TensorSpec((2, 4096, 4, 16), torch.float32)}
    plan: Any = partial(memory.plan_rings, {"k_cache_0": 30}, slabs, {}, num_new=100)
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 << 20)
    assert plan(torch.device("cuda")) is None
    assert plan(torch.device("cpu")).size("k_cache_0") == 192
    assert plan(torch.device("cuda"), is_asked_for=True).size("k_cache_0") == 192
    monkeypatch.setattr(memory, "available_memory", lambda device: (2 << 20) - 1)
    assert plan(torch.device("cuda")).size("k_cache_0") == 192


def test_a_refresh_keeps_rings_as_far_as_the_model_still_has_windows():
    model = toy_model("gemma2")
    fast = emssd_compile.optimize(model, "none", max_batch=1, max_length=120, backend="eager", prefill_chunk=20)
    assert fast.generate([prompt(70)], max_new_tokens=12)[0][70:] == Reference(model)(prompt(70), 12)
    assert "rings of 64 slots" in fast.explain().memory
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    model.config.sliding_window = 4096
    fast.refresh()
    assert "rings" not in fast.explain().memory
    assert fast.generate([prompt(70)], max_new_tokens=12)[0][70:] == Reference(model)(prompt(70), 12)


def test_slabs_are_taken_where_they_fit():
    for options in ({}, {"memory": "slab"}):
        fast = _optimized(**options)
        assert fast.explain().memory.startswith("slabs of 200 tokens for each of 2 rows, ")
        assert _allocated(fast) == 2 * 2 * 200 * 32 * 4
        assert "KV memory: slabs" in str(fast.explain())


@pytest.mark.parametrize(("kv_tokens", "blocks"), [(64, 1), (65, 2), (512, 8), (None, 8)])
def test_a_pool_holds_what_it_is_asked_for(kv_tokens, blocks):
    fast = _optimized(memory="paged", kv_tokens=kv_tokens)
    assert fast.explain().memory == (
        f"a pool of {blocks} blocks of 64 tokens, {64 * blocks} in all for 2 rows of up to 200, "
        f"{2 * blocks * 64 * 32 * 4 / 2**20:.1f} MiB"
    )
    assert _allocated(fast) == 2 * blocks * 64 * 32 * 4
    fast.warmup()
    (text,) = fast.generate([[5, 6, 7]], max_new_tokens=20)
    assert text == _optimized().generate([[5, 6, 7]], max_new_tokens=20)[0]
    fast._engine.calibrate()
    assert math.isfinite(fast._engine.times.expected(2))


def test_asking_for_tokens_asks_for_a_pool():
    assert _optimized(kv_tokens=128).explain().memory.startswith("a pool of 2 blocks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "ring"}, r"unknown memory 'ring'; choose one of \['auto', 'slab', 'paged'\]"),
        ({"memory": None}, "unknown memory None"),
        ({"memory": "slab", "kv_tokens": 64}, "kv_tokens=64 is for memory='paged': slabs hold max_length tokens"),
        ({"kv_tokens": 63}, "kv_tokens=63 is too small: blocks have 64 tokens.* pass at least 64"),
        ({"kv_tokens": 0}, "kv_tokens=0 is out of range; pass at least 1"),
        ({"kv_tokens": 1.5}, "kv_tokens=1.5 is not an integer"),
        ({"kv_tokens": True}, "kv_tokens=True is a bool"),
        ({"prefix_cache": True, "memory": "slab"}, "prefix_cache=True is for memory='paged'"),
        ({"prefix_cache": True, "deterministic": True}, "prefix_cache=True makes the sizes of steps depend on earlier"),
        ({"prefix_cache": 2}, "prefix_cache=2"),
        ({"kv_tokens": 513}, "kv_tokens=513 is more than 2 rows of 200 tokens take; pass at most 512"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(monkeypatch, options, message):
    monkeypatch.setattr("emssd_compile.optimized_model.check_weights", lambda module: pytest.fail("work was done"))
    with pytest.raises(OptionError, match=message):
        _optimized(**options)


def test_where_there_is_no_room_for_one_request_it_is_said(monkeypatch):
    fast = _optimized()
    monkeypatch.setattr(memory, "available_memory", lambda device: 20_000)
    with pytest.raises(CapacityError, match=r"one short request need 0\.0 MiB, and cpu has 0\.0 MiB to spare for them"):
        OptimizedModel(fast.model, fast._step, fast.options)
    with pytest.raises(CapacityError, match="the KV caches need"):
        OptimizedModel(fast.model, fast._step, replace(fast.options, memory="slab"))


def test_a_refresh_keeps_the_pool(monkeypatch):
    """While it is made, the old one is still there: what is left then says nothing."""
    fast = _optimized(memory="paged", kv_tokens=256)
    before = fast.explain().memory
    expected = fast.generate([[5, 6, 7]], max_new_tokens=20)
    fast.model.get_submodule("out").register_forward_hook(lambda *_: None)
    fast.refresh()
    assert fast.explain().memory == before
    assert fast.generate([[5, 6, 7]], max_new_tokens=20) == expected


def test_a_refresh_of_a_model_with_more_layers_has_them_all_in_the_pool():
    """Of a layer that stayed out of it, what others have read would be missing."""
    model = toy_model("llama", num_hidden_layers=1)
    fast = emssd_compile.optimize(model, "none", max_batch=2, max_length=200, backend="eager", prefix_cache=True)
    fast.generate([prompt(70)], max_new_tokens=4)
    other = toy_model("llama", num_hidden_layers=2)
    model.model.layers, model.config = other.model.layers, other.config
    model.model.config = other.config  # by which it counts them
    fast.refresh()
    assert "slabs" not in fast.explain().memory
    assert len(fast._engine.variant.signature.with_role("pool")) == 4
    assert fast.generate([prompt(70)], max_new_tokens=12) == [[*prompt(70), *Reference(model)(prompt(70), 12)]]
    assert fast.stats.prefix_cache_hits == 0


def test_what_a_row_can_hold_is_no_more_than_the_pool():
    fast = _optimized(kv_tokens=128)
    with fast.session() as session:
        assert session.capacity == 128
    with _optimized(kv_tokens=512).session() as session:
        assert session.capacity == 200


def test_a_drafter_that_would_lack_what_was_read_has_no_prefix_cache():
    class Keeps(LastBigram):
        """Keys and values that no op knows, so that they stay slabs."""

        def tensors(self, sizes):
            kept = TensorSpec((sizes.rows, sizes.capacity), torch.float32, kept="forever", in_place=True)
            return {**super().tensors(sizes), "kept": kept}

        def forward(self, context):
            context.state["kept"].add_(1)
            return super().forward(context)

    options: dict[str, Any] = {"max_batch": 2, "max_length": 64, "backend": "eager"}
    with pytest.raises(
        OptionError, match="prefix_cache=True: Keeps keeps keys and values of its own that it would lack"
    ):
        emssd_compile.optimize(Small(), Keeps(), **options, prefix_cache=True)
    fast = emssd_compile.optimize(Small(), Keeps(), **options, memory="paged")
    assert "texts that begin alike share nothing: Keeps keeps" in fast.explain().memory


def test_artifacts_have_slabs_and_say_so(tmp_path):
    pytest.importorskip("onnxruntime")
    fast = _optimized(memory="paged", kv_tokens=128, max_length=64)
    fast.export_onnx(tmp_path / "artifact")
    loaded = emssd_compile.load(tmp_path / "artifact")
    assert loaded.explain().memory.startswith("slabs of 64 tokens for each of 2 rows, ")
    assert "artifacts have no pool of blocks" in loaded.explain().memory
    assert loaded.generate([[5, 6, 7]], max_new_tokens=20) == fast.generate([[5, 6, 7]], max_new_tokens=20)
