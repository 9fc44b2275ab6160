"""`build`: engines are really built here, for GPUs that are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.export.tensorrt import TARGET, BuildOptions, build, passes
from emssd_compile.export.tensorrt.build import ENGINE, require, write
from emssd_compile.export.tensorrt.library import load_runtime, make_log
from emssd_compile.optimized_model import optimize
from emssd_compile.passes import PassManager, targeted
from emssd_compile.passes.graph import inputs
from emssd_compile.runtime.buckets import StepSizes, decode_buckets
from emssd_compile.step.signature import Signature
from tests.export.opened import signature_of
from tests.export.subjects import Forks
from tests.export.tensorrt.steps import CHUNK
from tests.ops.ragged import Heads
from tests.passes import trees
from tests.passes.graphs import BATCH, Scripted, step_of
from tests.zoo import toy_model

ROWS, LENGTH, CPU = 3, 64, torch.device("cpu")
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "prompt-lookup"): {"dtype": torch.float16, "compute_capabilities": ["8.0"]},
    ("llama", "none"): {"dtype": torch.float16, "compute_capabilities": ["8.9"]},
    ("opt", "prompt-lookup"): {"dtype": torch.float16, "compute_capabilities": ["8.0"]},
    ("opt", "none"): {"dtype": torch.bfloat16, "compute_capabilities": ["8.9", "12.0"], "weights": "streamed"},
    ("gpt2", "prompt-lookup"): {"dtype": torch.float16, "compute_capabilities": ["8.0"]},
    ("gpt2", "none"): {"dtype": torch.float16, "compute_capabilities": ["8.6", "8.9"]},
}


OFTEN = (("llama", "prompt-lookup"), ("opt", "none"))
"""An engine takes long to build: these are built each time, the others if --long."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=() if case in OFTEN else pytest.mark.long, id="-".join(case)) for case in CASES],
)
def built(request, tmp_path_factory):
    """The folder of an engine, what `write` returned, and what it was asked for."""
    options = dict(CASES[request.param])
    (architecture, drafter), dtype = request.param, options.pop("dtype")
    model = toy_model(architecture).to(dtype)
    fast = optimize(model, drafter, max_batch=ROWS, max_length=LENGTH, backend="eager", prefill_chunk=CHUNK)
    drafts = fast.drafter.num_draft_tokens
    sizes = (*decode_buckets(ROWS, drafts), StepSizes(CHUNK, ROWS * (drafts + 1), CHUNK + ROWS, CHUNK))
    folder = tmp_path_factory.mktemp(architecture)
    chosen = BuildOptions(**options)
    step = fast._step.for_target(passes(sizes, chosen), [])
    signature = Signature.of(step.graph, fast._step.roles)
    return folder, write(step, folder, sizes, chosen, signature), step, dtype, options


def test_one_file_is_written_and_json_can_keep_the_rest(built):
    folder, details, _, _, options = built
    assert [path.name for path in folder.iterdir()] == [ENGINE]
    assert (folder / ENGINE).stat().st_size > 2**20
    assert json.loads(json.dumps(details))["compute_capabilities"] == options["compute_capabilities"]
    assert details["runtime"] == "tensorrt-rtx"
    assert set(details["versions"]) == {"torch", "onnx", "onnxscript", "tensorrt-rtx"}


def test_caches_and_attention_are_layers_of_tensorrt(built):
    _, details, *_ = built
    assert details["layers"]["kv_cache_update"] == 4
    assert details["layers"]["attention_input"] == 2
    assert details["caches"] == {f"new_{kind}_cache_{i}": f"{kind}_cache_{i}" for i in range(2) for kind in "kv"}


def test_bindings_are_those_of_the_step(built):
    _, details, step, dtype, _ = built
    bound = {b["name"]: b for b in details["bindings"] if b["direction"] == "input"}
    assert list(bound) == [node.target for node in inputs(step.graph)]
    for node in inputs(step.graph):
        expected = [-1 if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
        assert bound[node.target]["shape"] == expected
    assert bound["k_cache_0"]["dtype"] == {torch.float16: "half", torch.bfloat16: "bf16"}[dtype]
    assert bound["k_cache_0"]["shape"][2] == LENGTH + CHUNK + ROWS, "room for the inert tail of the largest step"
    outputs = {b["name"] for b in details["bindings"] if b["direction"] == "output"}
    assert outputs == set(details["results"].values())
    assert {"report", "history", "lengths"} <= details["results"].keys()


def _write(folder: Path, **options: Any) -> dict[str, Any]:
    """Ask for an engine of the smallest step, in float32."""
    sizes = (StepSizes(CHUNK, BATCH.rows * 3, CHUNK + BATCH.rows, CHUNK),)
    step = step_of(Scripted([7, 8]))
    fake_mode = inputs(step.graph)[0].meta["val"].fake_mode
    chosen = BuildOptions(**{"compute_capabilities": ["8.0"], **options})
    PassManager(fake_mode).apply(step, (targeted(passes(sizes, chosen)),))
    return write(step, folder, sizes, chosen, signature_of(step))


def test_float32_can_be_decomposed(tmp_path):
    details = _write(tmp_path, attention="decomposed")
    assert details["layers"]["kv_cache_update"] == 2
    assert "attention_input" not in details["layers"]
    assert (tmp_path / ENGINE).exists()


@pytest.mark.parametrize(
    ("drafter", "attention", "writes"),
    [pytest.param(Forks(), "fused", 2, marks=pytest.mark.long), ("prompt-lookup", "masked", 1)],
)
def test_layers_that_see_the_same_are_built(drafter, attention, writes, tmp_path):
    """What two layers may see is one mask. Where drafts are trees, each cache is written once more, in place."""
    model = toy_model("llama").to(torch.float16)
    fast = optimize(model, drafter, max_batch=ROWS, max_length=LENGTH, backend="eager", prefill_chunk=CHUNK)
    most = ROWS * (fast.drafter.num_draft_tokens + 1)
    sizes = (StepSizes(CHUNK, most, CHUNK + ROWS, CHUNK),)
    chosen = BuildOptions(compute_capabilities=["8.0"], attention=attention)
    step = fast._step.for_target(passes(sizes, chosen), [])
    details = write(step, tmp_path, sizes, chosen, Signature.of(step.graph, fast._step.roles))
    assert details["layers"]["attention_input"] == 2
    assert details["layers"]["kv_cache_update"] == 4 * writes
    outputs = {b["name"] for b in details["bindings"] if b["direction"] == "output"}
    assert sum(cache == "k_cache_0" for name, cache in details["caches"].items() if name in outputs) == writes


def test_what_cannot_be_built_is_refused_before_any_work():
    with pytest.raises(OptionError, match=r"unknown options \['precision'\]; tensorrt knows \['runtime', "):
        TARGET.choose({"precision": "fp8"})
    with pytest.raises(OptionError, match=r"for TensorRT-RTX, and not \['9.0'\]"):
        require(BuildOptions(compute_capabilities=["9.0"]), CPU, False)
    with pytest.raises(OptionError, match="TensorRT-RTX has no version_compatible"):
        require(BuildOptions(compute_capabilities=["8.0"], version_compatible=True), CPU, False)
    require(BuildOptions(compute_capabilities=["8.0"]), CPU, False)


def test_an_engine_that_would_not_run_here_is_refused_where_it_is_to_be_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    chosen = BuildOptions(compute_capabilities=["8.0"])
    with pytest.raises(ArtifactError, match=r"for compute capability 8.0, here it is 9.0: .*pass check=False"):
        require(chosen, torch.device("cuda"), True)
    require(chosen, torch.device("cuda"), False)


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "tensorrt_rtx"])
def test_a_missing_library_is_named_with_what_installs_it(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ArtifactError, match=rf'{library} cannot be .* pip install "emssd_compile\[tensorrt-rtx\]"'):
        require(BuildOptions(compute_capabilities=["8.0"]), CPU, False)


def test_what_the_builder_says_is_passed_on(tmp_path, monkeypatch):
    log = make_log(load_runtime("tensorrt-rtx"))
    log.errors.append("Attention operation was not supported by a dedicated kernel")
    builder = SimpleNamespace(build_serialized_network=lambda network, config: None)
    monkeypatch.setattr(build, "define", lambda trt, parts, folder: (SimpleNamespace(), builder, log))
    monkeypatch.setattr(build, "_configure", lambda *given: None)
    with pytest.raises(ArtifactError, match=r"tensorrt-rtx cannot build the engine: Attention operation was not"):
        _write(tmp_path, attention="decomposed")
    assert not any(tmp_path.iterdir())


def _write_trees(folder: Path, monkeypatch: pytest.MonkeyPatch, head_size: int, attention: str) -> dict[str, Any]:
    """An engine of attention over draft trees alone, one layer for each way to look at them."""
    monkeypatch.setattr(trees, "HEADS", Heads(4, 2, head_size, head_size))
    if attention == "fused":
        known = [layer for layer in trees.LAYERS if not {"softcap", "sinks"} & layer.keys()]
        monkeypatch.setattr(trees, "LAYERS", known)
    dtype = torch.float32 if attention == "decomposed" else torch.float16
    given = trees.step_inputs(trees.tree_batch())
    graph_module, fake_mode = trees.tree_graph(
        {n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items()}
    )
    sizes, chosen = (
        (StepSizes(CHUNK, 9, CHUNK, CHUNK),),
        BuildOptions(attention=attention, compute_capabilities=["8.0"]),
    )
    for step in passes(sizes, chosen):
        PassManager(fake_mode)._run(step, "tensorrt", graph_module)
    return write(graph_module, folder, sizes, chosen, signature_of(graph_module))


@pytest.mark.parametrize(("attention", "layers"), [("fused", 4), ("decomposed", 6)])
def test_draft_trees_are_built_masks_from_bits_included(attention, layers, tmp_path, monkeypatch):
    details = _write_trees(tmp_path, monkeypatch, 64, attention)
    assert details["layers"]["kv_cache_update"] == 2 * layers
    assert details["layers"].get("attention_input", 0) == (layers if attention == "fused" else 0)


def test_a_head_size_without_a_kernel_is_refused_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match=r"not supported by a dedicated kernel.*export with attention='decomposed'"):
        _write_trees(tmp_path, monkeypatch, 8, "fused")
