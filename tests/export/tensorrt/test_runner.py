"""`runner`: what a machine without a GPU can say of it, on stand-ins for TensorRT and for CUDA's streams."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emssd_compile.errors import ArtifactError, CapacityError
from emssd_compile.export.folder import Files
from emssd_compile.export.tensorrt import environment
from emssd_compile.export.tensorrt.build import ENGINE, engine_name
from emssd_compile.export.tensorrt.runner import EngineStep, Loaded, check_details, check_engine, open_step
from emssd_compile.step.signature import Binding, Signature
from tests.export.opened import files_of

CPU = torch.device("cpu")


def _binding(name: str, direction: str, dtype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "direction": direction, "dtype": dtype, "shape": list(shape)}


DETAILS: dict[str, Any] = {
    "runtime": "tensorrt-rtx",
    "compute_capabilities": ["8.0", "8.9"],
    "options": {"weights": "in-engine", "version_compatible": False, "hardware_compatibility": "none"},
    "profiles": [{"token_range": [[1], [4], [4]]}, {"token_range": [[1], [32], [32]]}],
    "buckets": [{"token_range": 2, "draft_range": 5}, {"token_range": 4, "draft_range": 5}],
    "results": {
        "hidden": "hidden",
        "known": "new_known",
        "none": "new_none",
        "same": "token_range",
        "k_cache_0": "new_k_cache_0",
    },
    "caches": {"new_k_cache_0": "k_cache_0"},
    "bindings": [
        _binding("token_range", "input", "int64", -1),
        _binding("k_cache_0", "input", "half", 2, 1, 8, 4),
        _binding("new_known", "output", "int64", 2),
        _binding("new_none", "output", "int64", 2, 0),
        _binding("new_k_cache_0", "output", "half", 2, 1, 8, 4),
        _binding("hidden", "output", "half", -1, 6),
    ],
}

SIGNATURE = Signature(
    inputs=(
        Binding("token_range", ("token_range",), torch.int64, "size"),
        Binding("k_cache_0", (2, 1, 8, 4), torch.float16, "cache"),
    ),
    results=(
        Binding("hidden", ("token_range", 6), torch.float16, "result"),
        Binding("known", (2,), torch.int64, "state"),
        Binding("none", (2, 0), torch.int64, "state"),
        Binding("same", ("token_range",), torch.int64, "result"),
    ),
)


class Context:
    """Writes down what it is told, and what it held when it ran."""

    def __init__(self, config: SimpleNamespace) -> None:
        self.config = config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.runs: list[tuple[dict[str, int], dict[str, tuple[int, ...]], int]] = []

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        self.addresses[name] = address
        return name in {binding["name"] for binding in DETAILS["bindings"]}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self.shapes["token_range"], 6)

    def execute_async_v3(self, stream: int) -> bool:
        self.runs.append((dict(self.addresses), dict(self.shapes), stream))
        return True


class Engine:
    device_memory_size_v2 = 1024

    def __init__(self) -> None:
        self.contexts: list[Context] = []

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            dynamic_shapes_kernel_specialization_strategy="lazy",
        )

    def create_execution_context(self, config: SimpleNamespace) -> Context:
        self.contexts.append(Context(config))
        return self.contexts[-1]


TRT = SimpleNamespace(
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
)
LOG = SimpleNamespace(explain=lambda: "no reason")


@pytest.fixture
def step(monkeypatch):
    stream = SimpleNamespace(cuda_stream=77, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return EngineStep(Loaded(TRT, LOG, None, Engine()), DETAILS, ["token_range", "k_cache_0"], CPU)


def _call(step: EngineStep, tokens: int):
    slots, cache = torch.arange(tokens), torch.zeros(2, 1, 8, 4, dtype=torch.float16)
    return step(slots, cache), slots, cache


def test_tensors_are_bound_where_they_lie_and_caches_in_place(step):
    results, slots, cache = _call(step, 2)
    ((addresses, shapes, stream),) = step._loaded.engine.contexts[0].runs
    assert addresses["token_range"] == slots.data_ptr()
    assert addresses["k_cache_0"] == addresses["new_k_cache_0"] == cache.data_ptr()
    assert addresses["new_known"] == results["known"].data_ptr()
    assert shapes == {"token_range": (2,)}
    assert stream == 77
    assert set(results) == {"hidden", "known", "none", "same"}
    assert tuple(results["hidden"].shape) == (2, 6), "a size of its own for each call"
    assert results["same"] is slots
    assert (results["known"].dtype, tuple(results["known"].shape)) == (torch.int64, (2,))
    assert tuple(results["none"].shape) == (2, 0)


def test_captured_sizes_have_a_context_each_and_others_share_one_for_a_profile(step):
    for tokens in (2, 4, 2, 3, 1, 9, 32):
        _call(step, tokens)
    contexts = step._loaded.engine.contexts
    assert [[shapes["token_range"][0] for _, shapes, _ in c.runs] for c in contexts] == [[2, 2], [4], [3, 1], [9, 32]]
    assert [context.profile for context in contexts] == [0, 0, 0, 1]
    assert [c.config.dynamic_shapes_kernel_specialization_strategy for c in contexts] == [
        "eager",
        "eager",
        "lazy",
        "lazy",
    ]
    assert len({context.memory for context in contexts}) == 1, "they share their scratch memory"


def test_steps_that_are_too_large_are_refused(step):
    with pytest.raises(CapacityError, match=r"shapes up to .*32.*; this step has .*33"):
        _call(step, 33)


def test_what_tensorrt_refuses_is_passed_on(step):
    step._names = ("token_range", "v_cache_9")
    step._caches = {}
    with pytest.raises(ArtifactError, match="TensorRT refuses v_cache_9: no reason"):
        _call(step, 2)


def test_without_a_gpu_nothing_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in (CPU, torch.device("cuda")):
        with pytest.raises(ArtifactError, match="runs on a CUDA device; there is none here"):
            open_step(Files(tmp_path, {}), DETAILS, SIGNATURE, device)


@pytest.fixture
def on_capability(monkeypatch):
    """Makes believe that there is a GPU of a compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


def test_an_engine_that_cannot_be_read_is_refused_with_the_reason(tmp_path, on_capability):
    """There is no driver here, so no engine can."""
    (tmp_path / ENGINE).write_bytes(b"not an engine")
    on_capability(8, 9)
    with files_of(tmp_path) as files, pytest.raises(ArtifactError, match=r"rtx 1\.\S+ cannot read .*step.engine: .+"):
        open_step(files, DETAILS, SIGNATURE, torch.device("cuda"))


def test_a_gpu_that_was_not_built_for_is_refused(tmp_path, on_capability):
    on_capability(9, 0)
    with pytest.raises(ArtifactError, match=r"for compute capability 8.0, 8.9, here it is 9.0: export again to use"):
        open_step(Files(tmp_path, {}), DETAILS, SIGNATURE, torch.device("cuda"))
    compatible = {**DETAILS, "options": {**DETAILS["options"], "hardware_compatibility": "ampere-plus"}}
    with pytest.raises(ArtifactError, match=r"has no step\.engine"):  # that is, it goes on
        open_step(Files(tmp_path, {}), compatible, SIGNATURE, torch.device("cuda"))


def test_the_environment_is_the_same_where_it_is_made_and_where_it_is_loaded(on_capability):
    """The GPU that an engine is built on may be none of those that it is built for."""
    here = environment(DETAILS, CPU)
    assert here["tensorrt-rtx version"].startswith("1.")
    on_capability(9, 0)
    assert environment(DETAILS, torch.device("cuda")) == here
    options = {**DETAILS["options"], "version_compatible": True}
    assert environment({**DETAILS, "options": options}, CPU) == {"runtime": "tensorrt-rtx"}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("results", {**DETAILS["results"], "known": "new_none"}),
        ("results", {**DETAILS["results"], "other": "new_known"}),
        ("results", {"known": "new_known"}),
        ("caches", {"new_k_cache_0": "token_range"}),
        ("caches", {"new_known": "k_cache_0"}),
        ("caches", {}),
        ("profiles", []),
        ("profiles", [{"token_range": [[1], [4]]}]),
        ("profiles", [{"token_range": [[1], [4], [4, 4]]}]),
        ("profiles", [{"k_cache_0": [[1], [4], [4]]}]),
        ("bindings", DETAILS["bindings"][:-1]),
        ("bindings", [{**binding, "shape": [3]} for binding in DETAILS["bindings"]]),
        ("bindings", [{**binding, "dtype": "fp4"} for binding in DETAILS["bindings"]]),
        ("bindings", [{**binding, "direction": "sideways"} for binding in DETAILS["bindings"]]),
    ],
)
def test_parts_of_a_manifest_that_do_not_agree_are_named(name, changed):
    check_details(DETAILS, SIGNATURE)
    with pytest.raises(ArtifactError):
        check_details({**DETAILS, name: changed}, SIGNATURE)


def _engine(name: str, bindings: list[dict[str, Any]]) -> SimpleNamespace:
    """As much of an engine as says what it is."""
    of = {binding["name"]: binding for binding in bindings}
    return SimpleNamespace(
        name=name,
        num_io_tensors=len(bindings),
        get_tensor_name=lambda index: bindings[index]["name"],
        get_tensor_mode=lambda tensor: SimpleNamespace(name=of[tensor]["direction"].upper()),
        get_tensor_dtype=lambda tensor: SimpleNamespace(name=of[tensor]["dtype"].upper()),
        get_tensor_shape=lambda tensor: tuple(of[tensor]["shape"]),
    )


def test_an_engine_is_compared_with_its_manifest():
    own = engine_name(SIGNATURE, DETAILS["results"], DETAILS["caches"])
    for name in (own, ""):
        check_engine(_engine(name, DETAILS["bindings"]), DETAILS, SIGNATURE)
        with pytest.raises(ArtifactError, match="other bindings than its manifest says: hidden"):
            check_engine(_engine(name, DETAILS["bindings"][:-1]), DETAILS, SIGNATURE)
    swapped = {**DETAILS["results"], "none": "new_known", "known": "new_none"}
    with pytest.raises(ArtifactError, match="built with other bindings than its manifest has"):
        check_engine(_engine(own, DETAILS["bindings"]), {**DETAILS, "results": swapped}, SIGNATURE)
