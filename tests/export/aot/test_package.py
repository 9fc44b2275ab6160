"""Packages of machine code: the model's own tokens for any sizes, in place, without the model."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import emssd_compile
from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.export import LoadedGraph, open_graph
from emssd_compile.export.aot.package import environment, open_package, require
from emssd_compile.ops import load_cpu_kernels
from emssd_compile.step.signature import SIZE_NAMES, Signature
from tests.export.opened import files_of
from tests.export.subjects import CAPACITY, ROWS, VOCABULARY, K, artifact, optimized, prompt

NEW = 24
PROMPTS = [prompt(n) for n in (1, 2, 7, 30, 61)]  # more than there are rows, and longer than a chunk


def _inputs(sizes: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Two rows that decode, with three drafts and none, and one that reads its prompt; the KV caches are empty."""
    tensors = {name: value.clone() for name, value in optimized("lookup")._engine.tensors.items()}
    return tensors | {
        "option_min_new_tokens": torch.tensor([0, 50, 0]),
        "history": torch.randint(VOCABULARY, (ROWS, CAPACITY), generator=torch.Generator().manual_seed(0)),
        "known": torch.tensor([9, 20, 4]),
        "lengths": torch.tensor([8, 0, 3]),
        "draft_lengths": torch.tensor([3, 0, 0]),
        "draft_tokens": torch.randint(VOCABULARY, (ROWS, K), generator=torch.Generator().manual_seed(1)),
        "active": torch.ones(ROWS, dtype=torch.bool),
        "limits": torch.full((ROWS,), 50),
        **{name: torch.arange(size) for name, size in zip(SIZE_NAMES, sizes, strict=True)},
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes", [(40, 6, 9, 20), (25, 25, 25, 25), (5, 4, 1, 5), (1, 1, 1, 1), (2, 1, 7, 1), (64, 63, 61, 62)]
)
def test_one_package_serves_sizes_that_differ_and_sizes_that_agree(sizes):
    graph, fast = open_graph(artifact("aot", "lookup")), optimized("lookup")
    step = fast._make.whole(fast._step.suited({"min_new_tokens"}, drafts_for_few=False)).graphs[0]  # as it was exported
    ours, theirs = _inputs(sizes), _inputs(sizes)
    expected = step(*(ours[str(node.target)] for node in step.graph.find_nodes(op="placeholder")))
    results = graph(**theirs)
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
    for name, value in ours.items():  # the KV caches, above all
        torch.testing.assert_close(theirs[name], value, msg=name)


@dataclass(frozen=True)
class _Export:
    """What an export did beside what it was asked for."""

    artifact: Path
    working_folder: Path
    settings: tuple[object, object]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The model alone, exported from an empty working folder."""
    folder, work = tmp_path_factory.mktemp("alone") / "artifact", tmp_path_factory.mktemp("work")
    before = _settings()
    with contextlib.chdir(work):
        optimized("none").export_aot(folder, verify_only=True)
    return _Export(folder, work, (before, _settings()))


def _settings() -> object:
    return torch._inductor.config.get_config_copy(), torch.compiler.config.cache_key_tag


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_model_alone_takes_any_number_of_tokens(alone, tokens):
    graph = open_graph(alone.artifact)
    ids = torch.arange(tokens) % VOCABULARY
    results = graph(
        input_ids=ids,
        positions=torch.arange(tokens),
        row_ids=torch.full((tokens,), 1),
        offsets=torch.tensor([0, 0, tokens, tokens]),
        lengths=torch.zeros(ROWS, dtype=torch.int64),
        logit_index=torch.tensor([tokens - 1]),
        **graph.empty("cache"),
    )
    torch.testing.assert_close(results["logits"], optimized("none").model(ids[None])[0, -1:])


@torch.no_grad()
def test_neither_kv_nor_weights_are_copied():
    assert load_cpu_kernels()
    graph, inputs = open_graph(artifact("aot", "lookup")), _inputs((30, 8, 8, 24))
    profile = _profiled(graph, inputs)
    assert profile.calls["emssd::grouped_linear"] == 3
    caches = [value.nbytes for name, value in inputs.items() if "_cache_" in name]
    assert 0 < profile.largest_allocation < min(caches)


@dataclass(frozen=True)
class _Profile:
    calls: Counter[str]
    largest_allocation: int


def _profiled(graph: LoadedGraph, inputs: dict[str, Tensor]) -> _Profile:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        graph(**inputs)
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    return _Profile(
        Counter({event.key: event.count for event in profile.key_averages()}),
        max(event.nbytes() for event in events if event.name() == "[memory]"),
    )


FRESH = """
import json, sys
import emssd_compile
from emssd_compile.ops import cpu_kernel_status

fast = emssd_compile.load(sys.argv[1])
tokens = fast.generate(json.loads(sys.argv[2]), max_new_tokens=int(sys.argv[3]))
print(json.dumps({"tokens": tokens, "kernels": cpu_kernel_status(), "modules": [*sys.modules]}))
"""


def test_a_process_without_the_model_and_without_a_compiler_decodes(tmp_path):
    command = [sys.executable, "-c", FRESH, str(artifact("aot", "lookup")), json.dumps(PROMPTS), str(NEW)]
    without_compiler = {"PATH": "", "CXX": "", "EMSSD_CACHE_DIR": str(tmp_path)}
    environ = {**os.environ, **without_compiler, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["tokens"] == optimized("lookup").generate(PROMPTS, max_new_tokens=NEW)
    assert said["kernels"].endswith("libemssd_ops.so")
    assert not {"transformers", "tests"} & set(said["modules"])


def test_an_export_leaves_nothing_behind(alone):
    names = {path.name for path in alone.artifact.iterdir()}
    assert names == {"step.pt2", "libemssd_ops.so", "bindings.txt", "manifest.json"}
    assert [path.name for path in alone.artifact.parent.iterdir()] == ["artifact"]
    assert not list(alone.working_folder.iterdir())
    before, after = alone.settings
    assert after == before


def test_the_machine_that_it_was_made_for_is_recorded():
    recorded = json.loads((artifact("aot", "lookup") / "manifest.json").read_text())["environment"]
    assert recorded == environment({}, torch.device("cpu"))
    assert recorded["torch"] == torch.__version__
    assert recorded["instruction set"].split()[0] == torch.backends.cpu.get_cpu_capability()


def test_another_instruction_set_is_refused(monkeypatch):
    folder = artifact("aot", "lookup")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "Z80")
    with pytest.raises(ArtifactError, match=r"made for instruction set .*, here it is Z80"):
        emssd_compile.load(folder)


def test_another_kind_of_device_is_refused():
    with pytest.raises(OptionError, match="for aot, which runs on cpu, not on cuda"):
        emssd_compile.load(artifact("aot", "lookup"), device="cuda")


def test_a_gpu_is_refused_before_anything_is_compiled():
    with pytest.raises(ArtifactError, match="a package for cuda ends the process that loads it"):
        require(None, torch.device("cuda"), False)


def test_other_ops_are_refused(monkeypatch):
    folder = artifact("aot", "lookup")
    monkeypatch.setattr("emssd_compile.export.aot.package.source_hash", lambda: "0" * 64)
    with pytest.raises(ArtifactError, match=r"made for ops of emssd_compile .*, here it is 0000"):
        emssd_compile.load(folder)


def test_a_machine_without_a_compiler_is_told_at_once(tmp_path, monkeypatch):
    optimized("none")
    for name, value in {"PATH": "", "CXX": "", "EMSSD_CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArtifactError, match=r"no C\+\+ compiler found"):
        optimized("none").export_aot(tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


def test_what_is_no_package_is_refused(tmp_path):
    (tmp_path / "step.pt2").write_bytes(b"not a package")
    with files_of(tmp_path) as files, pytest.raises(ArtifactError, match=r"step.pt2 cannot be loaded"):
        open_package(files, {}, Signature((), ()), torch.device("cpu"))
