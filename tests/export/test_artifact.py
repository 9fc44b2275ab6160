"""Artifacts, by a target that costs nothing: what is loaded is what was written, or it is not loaded."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import emssd_compile
import emssd_compile.export as targets
from emssd_compile.drafters import PromptLookup
from emssd_compile.errors import ArtifactError, InvalidInputError, OptionError
from emssd_compile.export import LoadedGraph, open_graph
from emssd_compile.export.folder import read_manifest
from emssd_compile.export.manifest import _dump
from emssd_compile.optimize import OptimizedModel
from emssd_compile.runtime.assembly import assemble
from emssd_compile.runtime.buckets import Sizes
from emssd_compile.runtime.engine import Engine
from tests.exactness.compiled import K
from tests.exactness.models import Reference, build, prompt
from tests.export import toy

NEW = 12
PROMPTS = [prompt(n) for n in (5, 17, 2, 30)]


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    model.generation_config.pad_token_id = 3  # type: ignore[union-attr]  # a Hugging Face model
    return model


@pytest.fixture(scope="module")
def fast(model):
    return emssd_compile.optimize(model, PromptLookup(K), max_batch=2, max_length=64, backend="eager", prefill_chunk=16)


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    toy.install(monkeypatch)


def export(fast: OptimizedModel, folder: Path, *, verify_only: bool = False, **options: Any) -> Path:
    fast._export("toy", folder, verify_only, True, False, **options)
    return folder


@pytest.fixture
def artifact(fast, tmp_path):
    return export(fast, tmp_path / "artifact")


def test_what_is_loaded_decodes_as_what_was_exported(fast, model, artifact):
    loaded = emssd_compile.load(artifact)
    reference = Reference(model)
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    fast.stats.reset()
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert loaded.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert loaded.stats.num_emitted_tokens == fast.stats.num_emitted_tokens == NEW * len(PROMPTS)
    assert (loaded.device, loaded.dtype) == (fast.device, fast.dtype)
    assert str(loaded.explain()) == str(fast.explain())


def test_the_models_defaults_for_options_come_along(fast, model, artifact):
    """A tensor whose rows end early is padded with the model's own pad token."""
    eos = Reference(model)(PROMPTS[1], NEW)[3]
    ids = torch.tensor([PROMPTS[1]] * 2)
    ids[1, 3] = 7
    mask = torch.ones_like(ids)
    own, loaded = (
        decoder.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=eos)
        for decoder in (fast, emssd_compile.load(artifact))
    )
    assert isinstance(own, torch.Tensor)
    assert isinstance(loaded, torch.Tensor)
    assert own.tolist() == loaded.tolist()
    assert own[0, -1] == 3


def test_a_changed_byte_anywhere_is_refused(artifact):
    for file in sorted(path for path in artifact.rglob("*") if path.is_file()):
        data = file.read_bytes()
        for place in range(0, len(data), max(len(data) // 200, 1)):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(ArtifactError):
                emssd_compile.load(artifact)
        file.write_bytes(data)
    emssd_compile.load(artifact)


def test_bytes_that_json_does_not_mind_are_refused_too(artifact):
    manifest = artifact / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=2))
    with pytest.raises(ArtifactError, match="not what was written"):
        emssd_compile.load(artifact)


def test_files_that_the_manifest_does_not_name_are_left_alone(artifact):
    """A repository's own, or notes."""
    (artifact / "README.md").write_text("mine")
    (artifact / "inner" / "cache").mkdir()
    emssd_compile.load(artifact).generate(PROMPTS[:1], max_new_tokens=2)
    assert (artifact / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "inner" / "step.txt").unlink(), "step.txt is missing"),
        (lambda folder: (folder / "inner" / "step.txt").write_bytes(b"to"), "has 2 bytes, .* were written"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_bytes(b'{"format": 1, "tar'), "is no manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"[]"), "is no manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"[" * 100_000), "is no manifest"),
    ],
)
def test_damage_is_named(artifact, damage, message):
    damage(artifact)
    with pytest.raises(ArtifactError, match=message):
        emssd_compile.load(artifact)


def _rewrite(artifact: Path, change) -> None:
    """Change the manifest and give it the hash that it should have: it is not damaged, but it is wrong."""
    file = artifact / "manifest.json"
    content = json.loads(file.read_bytes())
    del content["sha256"]
    change(content)
    digest = hashlib.sha256(_dump(content)).hexdigest()
    file.write_bytes(_dump({**content, "sha256": digest}))


@pytest.mark.parametrize("wrong", [None, {}, [3], [{"x": 1}], True], ids=repr)
def test_an_entry_of_another_type_is_refused(artifact, wrong):
    """Whoever wrote it: an error that says so, and nothing is opened."""
    original = (artifact / "manifest.json").read_bytes()
    for name, value in json.loads(original).items():
        if name != "sha256" and type(value) is not type(wrong):
            (artifact / "manifest.json").write_bytes(original)
            _rewrite(artifact, lambda content, name=name: content.update({name: wrong}))
            with pytest.raises(ArtifactError, match=r"cannot be read|no manifest|has format"):
                emssd_compile.load(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["inputs"][0].update(dtype="load"), "inputs cannot be read"),
        (lambda content: content["inputs"].pop(0), "inputs cannot be read"),
        (lambda content: content.update(buckets=[[1, 2]]), "buckets cannot be read"),
        (lambda content: content["files"].update({"../x": content["files"]["empty"]}), "files cannot be read"),
        (lambda content: content["details"].clear(), "is no artifact of toy: its details lack 'graph'"),
        (lambda content: content.update(target="future"), "is for 'future', which is none of"),
    ],
)
def test_what_makes_no_sense_in_a_manifest_is_named(artifact, change, message):
    _rewrite(artifact, change)
    with pytest.raises(ArtifactError, match=message):
        emssd_compile.load(artifact)


def test_another_machine_is_named(artifact, monkeypatch):
    monkeypatch.setitem(toy.ENVIRONMENT, "weather", "rain")
    with pytest.raises(ArtifactError, match="made for weather fine, here it is rain"):
        emssd_compile.load(artifact)


def test_another_version_of_the_package_that_writes_the_same_format_is_loaded(artifact):
    _rewrite(artifact, lambda content: content.update(emssd_compile="99.0"))
    assert emssd_compile.load(artifact).manifest.emssd_compile == "99.0"


def test_another_format_is_named(artifact, monkeypatch):
    monkeypatch.setattr("emssd_compile.export.manifest.FORMAT", 2)
    with pytest.raises(ArtifactError, match="has format 1, this package reads 2"):
        emssd_compile.load(artifact)


def test_a_device_that_the_target_does_not_run_on_is_refused(artifact):
    with pytest.raises(OptionError, match="runs on cpu, not on cuda"):
        emssd_compile.load(artifact, device="cuda")


@pytest.mark.parametrize("device", ["gpu", 3.5])
def test_a_device_that_does_not_exist_is_refused(artifact, device):
    with pytest.raises(OptionError, match="none that torch knows"):
        emssd_compile.load(artifact, device=device)


def test_no_folder_and_no_artifact_are_told_apart(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        emssd_compile.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no manifest"):
        emssd_compile.load(tmp_path)


@pytest.mark.parametrize("is_captured", [True, False])
def test_steps_are_captured_only_where_they_can_be(artifact, monkeypatch, is_captured):
    """On a CUDA device, that is; here, which sizes would be."""
    target = replace(targets.find_target("toy"), is_captured=is_captured)
    monkeypatch.setitem(sys.modules, "emssd_compile.export.toy", SimpleNamespace(TARGET=target))
    asked: list[int] = []

    def assembled(*args: Any, buckets: tuple[Sizes, ...], **options: Any) -> Engine:
        asked.append(len(buckets))
        return assemble(*args, buckets=buckets, **options)

    monkeypatch.setattr("emssd_compile.loading.assemble", assembled)
    emssd_compile.load(artifact)
    assert (asked[0] > 0) == is_captured
    assert not targets.find_target("onnx").is_captured


def test_a_folder_that_holds_something_is_left_alone(fast, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists"):
        export(fast, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_taken(fast, tmp_path):
    emssd_compile.load(export(fast, tmp_path))


def test_a_place_that_no_folder_can_take_is_refused_at_once(fast, tmp_path, monkeypatch):
    """A rename would fail in the end, when the work is done."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="the folder that this process works in"):
        export(fast, Path())
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    (tmp_path / "volume").mkdir()
    with pytest.raises(ArtifactError, match="volume is a mount point"):
        export(fast, tmp_path / "volume")
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_a_link_to_an_empty_folder_stays_a_link(fast, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(fast, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    emssd_compile.load(tmp_path / "real")


@pytest.mark.parametrize(
    ("interruption", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ArtifactError, "No space left on device; nothing was left"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("the builder broke"), RuntimeError, "the builder broke"),
    ],
    ids=["disk full", "interrupted", "builder broke"],
)
@pytest.mark.parametrize("moment", ["building", "sealing"])
def test_an_interrupted_export_leaves_nothing(fast, tmp_path, monkeypatch, interruption, raised, message, moment):
    def broken(path: Path) -> None:
        raise interruption

    if moment == "building":
        monkeypatch.setattr(Path, "write_text", lambda path, text: broken(path))
    else:
        monkeypatch.setattr("emssd_compile.export.folder._flush", broken)
    with pytest.raises(raised, match=message):
        export(fast, tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_rename_is_flushed_too(fast, tmp_path, monkeypatch):
    """The files before it, the folder that it happens in after it."""
    flushed: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    export(fast, tmp_path / "artifact")
    assert [path.name for path in flushed[:-2]] == ["empty", "step.txt", "manifest.json"]
    assert flushed[-2].name.endswith(".partial")
    assert flushed[-1] == tmp_path


def test_an_interrupted_folder_does_not_load(fast, tmp_path, monkeypatch):
    """As after a power cut: even what could not be cleaned up is no artifact."""
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr("emssd_compile.export.manifest.Manifest.to_bytes", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(fast, tmp_path / "artifact")
    (left,) = tmp_path.iterdir()
    assert list(left.iterdir())
    with pytest.raises(ArtifactError, match="no manifest"):
        emssd_compile.load(left)


def test_the_manifest_says_what_the_step_was_made_from(artifact):
    manifest = read_manifest(artifact)
    assert (manifest.target, manifest.kind, manifest.drafter) == ("toy", "step", "PromptLookup")
    assert (manifest.layout, manifest.acceptance, manifest.dtype) == ("auto", "GreedyMatch", "float32")
    bindings = {binding.name: binding for binding in manifest.signature.inputs}
    assert bindings["history"].shape == (2, 64)
    assert bindings["token_slots"].shape == ("token_slots",)
    assert {b.role for b in bindings.values()} == {"state", "setting", "size", "cache", "row", "memory"}
    assert {b.name for b in manifest.signature.results} == {
        *(name for name, b in bindings.items() if b.role in ("state", "row", "memory")),
        "report",
    }


@pytest.fixture(scope="module")
def verify_inputs():
    """Rows of 3 and 1 tokens behind 0 and 2 committed ones, and an inert tail token."""
    return {
        "input_ids": torch.tensor([5, 6, 7, 9, 0]),
        "positions": torch.tensor([0, 1, 2, 2, 0]),
        "row_ids": torch.tensor([0, 0, 0, 1, 2]),
        "offsets": torch.tensor([0, 3, 4]),
        "lengths": torch.tensor([0, 2]),
        "logit_index": torch.tensor([2, 3]),
    }


def test_a_verify_only_graph_is_for_loops_of_ones_own(fast, tmp_path, verify_inputs):
    folder = export(fast, tmp_path / "verify", verify_only=True)
    with pytest.raises(ArtifactError, match="open_graph"):
        emssd_compile.load(folder)
    assert not {"fuse_verify", "fuse_draft"} & {r["name"] for r in read_manifest(folder).explanation["records"]}
    graph = open_graph(folder)
    with pytest.raises(OptionError, match="role='caches' is none"):
        graph.empty("caches")
    results = graph(**verify_inputs, **graph.empty("cache"))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(results["logits"][0], fast.model(ids).logits[0, -1], rtol=1e-4, atol=1e-4)
    assert results["hidden"].shape[0] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "missing or unknown: input_ids"),
        ({"ids": torch.zeros(5)}, "missing or unknown: ids"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, r"positions has shape \[4\]"),
        ({"lengths": torch.zeros(2)}, "lengths is torch.float32"),
        ({"offsets": torch.zeros(3, 1, dtype=torch.int64)}, "offsets has shape"),
        ({"row_ids": torch.zeros(5, 2, dtype=torch.int64)[:, 0]}, "row_ids is not contiguous"),
    ],
)
def test_wrong_inputs_of_a_graph_are_named(fast, tmp_path, verify_inputs, change, message):
    graph = open_graph(export(fast, tmp_path / "verify", verify_only=True))
    given = {name: value for name, value in {**verify_inputs, **change}.items() if value is not None}
    with pytest.raises(InvalidInputError, match=message):
        graph(**given, **graph.empty("cache"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"colour": 1}, r"unknown options \['colour'\]; toy knows \['label'\]"), ({"label": ""}, "label is empty")],
)
def test_options_are_refused_before_any_work(fast, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("emssd_compile.exporting.suit", None)
    with pytest.raises(OptionError, match=message):
        export(fast, tmp_path / "artifact", **options)


@pytest.mark.parametrize(("verify_only", "check"), [(False, True), (False, False), (True, True)])
def test_what_is_missing_is_found_before_any_work_and_only_if_it_is_needed(
    fast, tmp_path, monkeypatch, verify_only, check
):
    asked: list[bool] = []
    monkeypatch.setattr(toy, "require", lambda options, device, runs: asked.append(runs))
    fast._export("toy", tmp_path / "artifact", verify_only, check, False)
    assert asked == [check and not verify_only]

    def missing(*asked: object) -> None:
        raise ArtifactError("no toy shop")

    monkeypatch.setattr(toy, "require", missing)
    monkeypatch.setattr("emssd_compile.exporting.suit", None)
    with pytest.raises(ArtifactError, match="no toy shop"):
        fast._export("toy", tmp_path / "other", verify_only, check, False)


def test_a_tensor_on_another_device_of_the_kind_is_refused(fast, tmp_path, verify_inputs):
    manifest = read_manifest(export(fast, tmp_path / "verify", verify_only=True))
    with FakeTensorMode(allow_non_fake_inputs=True):  # makes believe that there are several
        graph = LoadedGraph(manifest, torch.device("cuda"), lambda *inputs: {"all": inputs[0]})
        given = {name: value.to("cuda:0") for name, value in verify_inputs.items()} | graph.empty("cache")
        assert set(graph(**given)) == {"all"}
        with pytest.raises(InvalidInputError, match=r"offsets is torch.int64 on cuda:1, expected torch.int64 on cuda:0"):
            graph(**{**given, "offsets": given["offsets"].to("cuda:1")})


def test_the_check_holds_one_set_of_caches_at_a_time(fast, tmp_path, monkeypatch):
    """Without waiting for the garbage collector."""
    made: list[weakref.ref[Engine]] = []

    def assembled(*args: Any, **options: Any) -> Engine:
        assert not any(engine() for engine in made)
        engine = assemble(*args, **options)
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr("emssd_compile.exporting.assemble", assembled)
    gc.disable()
    try:
        export(fast, tmp_path / "artifact")
    finally:
        gc.enable()
    assert len(made) == 2


def test_an_artifact_that_decodes_other_tokens_is_not_finished(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "distort", lambda results: {**results, "history": results["history"].flip(0)})
    with pytest.raises(ArtifactError, match="decodes other tokens"):
        export(fast, tmp_path / "artifact")
    assert not list(tmp_path.iterdir())
    fast._export("toy", tmp_path / "artifact", False, False, False)
