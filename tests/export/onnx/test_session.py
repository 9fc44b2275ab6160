"""`OnnxStep`: ONNX Runtime works in the memory of the tensors that it is given."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

import emssd_compile
from emssd_compile.errors import ArtifactError, InvalidInputError
from emssd_compile.export import LoadedGraph, open_graph
from emssd_compile.export.folder import Files
from emssd_compile.export.onnx.session import OnnxStep, open_session
from emssd_compile.step.signature import Signature
from tests.export.crafted import rehash
from tests.export.opened import files_of
from tests.export.subjects import ROWS, VOCABULARY, K, artifact, optimized, prompt
from tests.passes.graphs import model_with_attention

NONE = Signature((), ())


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[OnnxStep, dict[str, Tensor]]:
    """A model whose cache dwarfs it, and the inputs of a step of one token a row."""
    rows, capacity = 64, 8192
    model = model_with_attention()
    model.table = torch.randn(capacity, model.table.shape[1])
    fast = emssd_compile.optimize(model, "none", max_batch=rows, max_length=capacity, backend="eager")
    folder = tmp_path_factory.mktemp("large") / "artifact"
    fast.export_onnx(folder, verify_only=True)
    graph = emssd_compile.export.open_graph(folder)
    row = torch.arange(rows)
    inputs = {
        "input_ids": row % 7,
        "positions": torch.zeros_like(row),
        "row_ids": row,
        "offsets": torch.arange(rows + 1),
        "lengths": torch.zeros_like(row),
        "logit_index": row.clone(),
        **{name: torch.full_like(cache, 7.0) for name, cache in graph.empty("cache").items()},
        "row_range": torch.arange(1),
    }
    assert isinstance(graph._step, OnnxStep)
    return graph._step, inputs


def test_what_a_step_does_not_write_in_a_cache_stays_as_it_is(large):
    step, inputs = large
    results = step(*inputs.values())
    assert set(results) == {"hidden", "logits"}
    for name in ("k_cache_0", "v_cache_0"):
        assert (inputs[name][:, :, 0] != 7).all()
        assert (inputs[name][:, :, 1:] == 7).all()


def test_caches_are_not_copied(large):
    """64 MB of them: a step that copies them takes many times as long as one that does not."""
    step, inputs = large
    elsewhere = {name: torch.empty_like(inputs[name]) for name in ("k_cache_0", "v_cache_0")}

    def seconds(caches: dict[str, Tensor]) -> float:
        for name, cache in caches.items():
            step._bind(step._binding.bind_output, f"new_{name}", cache)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step.session.run_with_iobinding(step._binding)
            times.append(time.perf_counter() - start)
        return min(times)

    results = step(*inputs.values())  # held until the last run: it is these that are written
    in_place = seconds({name: inputs[name] for name in elsewhere})
    copied = seconds(elsewhere)
    del results
    assert (elsewhere["k_cache_0"][:, :, 1:] == 7).all(), "bound elsewhere, all of it is copied"
    assert in_place < copied / 3


def test_results_of_one_step_are_left_alone_by_the_next(large):
    step, inputs = large
    first = step(*inputs.values())["logits"]
    kept = first.clone()
    step(*{**inputs, "input_ids": inputs["input_ids"] + 1}.values())
    assert torch.equal(first, kept)


def test_a_tensor_that_is_not_contiguous_is_refused(large):
    step, inputs = large
    with pytest.raises(InvalidInputError, match="k_cache_0 is not contiguous"):
        step(*{**inputs, "k_cache_0": inputs["k_cache_0"].transpose(2, 3)}.values())


def test_half_precision_gives_mostly_the_same_tokens(tmp_path):
    fast = emssd_compile.optimize(model_with_attention().half(), "none", max_batch=2, max_length=64, backend="eager")
    fast.export_onnx(tmp_path / "half")
    prompts = [[7, 3, 9, 1], [4, 4], [30, 2, 8, 6, 11]]
    expected, found = (
        each.generate(prompts, max_new_tokens=8) for each in (fast, emssd_compile.load(tmp_path / "half"))
    )
    same = [
        a == b
        for mine, theirs in zip(expected, found, strict=True)
        for a, b in zip(mine[-8:], theirs[-8:], strict=True)
    ]
    assert sum(same) >= 20, "of 24: where two logits are equal to the last bits, either may come"


def test_what_onnxruntime_cannot_run_is_said_so(tmp_path):
    """It multiplies no bfloat16 on a CPU; and a file may be no model at all."""
    model = model_with_attention().bfloat16()
    emssd_compile.optimize(model, "none", max_batch=2, max_length=16, backend="eager").export_onnx(tmp_path / "bf16")
    with pytest.raises(ArtifactError, match=r"onnxruntime .* cannot run .*step.onnx"):
        emssd_compile.load(tmp_path / "bf16")
    (tmp_path / "step.onnx").write_bytes(b"no model")
    shutil.rmtree(tmp_path / "bf16")
    with files_of(tmp_path) as files, pytest.raises(ArtifactError, match=r"onnxruntime .* cannot run .*step.onnx"):
        open_session(files, {"in_place": {}}, NONE, torch.device("cpu"))


@pytest.mark.parametrize("version", ["1.26.1", "0.5"])
def test_a_runtime_that_would_decode_other_tokens_is_refused(monkeypatch, version):
    monkeypatch.setattr("onnxruntime.__version__", version)
    with pytest.raises(ArtifactError, match=rf"onnxruntime {version} .* 1\.27 or newer is needed"):
        open_session(Files(Path(), {}), {}, NONE, torch.device("cpu"))


def test_a_device_without_a_provider_is_named():
    with pytest.raises(ArtifactError, match=r"no CUDAExecutionProvider: .* \"emssd_compile\[onnx-gpu\]\""):
        open_session(Files(Path(), {}), {}, NONE, torch.device("cuda", 0))


def test_a_provider_that_does_not_start_is_named(large, monkeypatch, tmp_path):
    """It would run on the CPU instead, on memory that is not there."""
    (tmp_path / "step.onnx").write_bytes(b"a model")
    step, _ = large
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *args, **kwargs: step.session)
    with files_of(tmp_path) as files, pytest.raises(ArtifactError, match="cannot start its CUDAExecutionProvider"):
        open_session(files, {}, NONE, torch.device("cuda", 0))


def test_each_write_of_a_cache_can_be_in_its_memory():
    """Those of a draft model as well, which writes once for each token that it drafts."""
    graph = onnx.load(artifact("onnx", "draft-model") / "step.onnx").graph
    outputs = {output.name for output in graph.output}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        consumers.setdefault(node.input[0], []).append(node)
    for cache in (entry.name for entry in graph.input if "_cache_" in entry.name):
        written, value = 0, cache
        while scatters := [node for node in consumers[value] if node.op_type == "ScatterND"]:
            (value,) = scatters[0].output
            assert value in outputs
            written += 1
        assert written == (K if cache.startswith("drafter_") else 1)


def _logits(graph: LoadedGraph, seed: int) -> Tensor:
    """What a graph gives for a text of its own, in caches of its own, token by token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (24,), generator=generator)
    caches, found = graph.empty("cache"), []
    for place in range(len(ids)):
        given = {
            "input_ids": ids[place : place + 1].clone(),
            "positions": torch.tensor([place]),
            "row_ids": torch.tensor([0]),
            "offsets": torch.tensor([0, *[1] * ROWS]),
            "lengths": torch.tensor([place, *[0] * (ROWS - 1)]),
            "logit_index": torch.tensor([0]),
            "row_range": torch.arange(1),
        }
        found.append(graph(**given, **caches)["logits"])
    return torch.cat(found)


def test_threads_get_their_own_results(tmp_path):
    """Of one graph, and of two that were opened from one folder."""
    optimized("none").export_onnx(tmp_path / "alone", verify_only=True)
    one, other = (open_graph(tmp_path / "alone") for _ in range(2))
    graphs = [one, one, one, other]
    expected = [_logits(one, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = [*pool.map(_logits, graphs, range(4))]
            for mine, theirs in zip(expected, found, strict=True):
                assert torch.equal(mine, theirs)


def test_weights_beside_the_model_are_those_that_were_hashed(tmp_path, monkeypatch):
    """Those of large models lie in a file of their own; no other can be read in its place."""
    monkeypatch.chdir(tmp_path)
    optimized("none").export_onnx(tmp_path / "artifact")
    model = onnx.load(tmp_path / "artifact" / "step.onnx")
    onnx.save(model, tmp_path / "artifact" / "step.onnx", save_as_external_data=True, location="w", size_threshold=64)
    rehash(tmp_path / "artifact", "step.onnx")
    weights = tmp_path / "artifact" / "w"
    prompts = [prompt(7)]
    shutil.copyfile(weights, tmp_path / "w")  # in the working folder
    with pytest.raises(ArtifactError, match=r"onnxruntime .* cannot run"):
        emssd_compile.load(tmp_path / "artifact")  # the manifest does not name it
    rehash(tmp_path / "artifact", "w")
    loaded = emssd_compile.load(tmp_path / "artifact", target="onnx")
    expected = optimized("none").generate(prompts, max_new_tokens=8)
    assert loaded.generate(prompts, max_new_tokens=8) == expected
    weights.write_bytes(bytes(weights.stat().st_size))  # while it is in use
    assert loaded.generate(prompts, max_new_tokens=8) == expected
