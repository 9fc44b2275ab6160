"""`manifest`: what it says of an artifact, and what in it is refused, whoever wrote it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

import emssd_compile
from emssd_compile.errors import ArtifactError
from emssd_compile.export.folder import read_manifest
from emssd_compile.export.manifest import FORMAT
from tests.export import toy
from tests.export.crafted import rewrite

pytestmark = pytest.mark.usefixtures("toy_target")


def test_the_manifest_says_what_the_step_was_made_from(artifact):
    manifest = read_manifest(artifact)
    assert (manifest.target, manifest.kind, manifest.drafter) == ("toy", "step", "PromptLookup")
    assert (manifest.layout, manifest.acceptance, manifest.dtype) == ("auto", "TargetMatch", "float32")
    bindings = {binding.name: binding for binding in manifest.signature.inputs}
    assert bindings["history"].shape == (2, 64)
    assert bindings["token_range"].shape == ("token_range",)
    assert {b.role for b in bindings.values()} == {"state", "setting", "size", "cache", "row", "memory", "option"}
    assert {b.name for b in manifest.signature.results} == {
        *(name for name, b in bindings.items() if b.role in ("state", "row", "memory")),
        "report",
    }


def _option(content: dict[str, Any], **changed: Any) -> None:
    next(b for b in content["inputs"] if b["name"] == "option_suppress_tokens")["option"].update(changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [1023]},
        {"shape": []},
        {"shape": 1024},
        {"reader": ""},
        {"reader": "token_sequences"},
        {"reader": "exec"},
        {"reader": []},
        {"reader": None},
        {"default": "x"},
    ],
)
def test_a_table_that_its_reader_does_not_fit_is_refused(fast, tmp_path, changed):
    artifact = toy.export(fast, tmp_path / "artifact", row_options=["suppress_tokens"])
    (binding,) = (b for b in read_manifest(artifact).signature.inputs if b.name == "option_suppress_tokens")
    assert binding.option is not None
    assert (binding.shape, binding.option.shape, binding.option.reader) == ((2, 1024), (1024,), "token_ids")
    rewrite(artifact, partial(_option, **changed))
    with pytest.raises(ArtifactError, match="inputs cannot be read"):
        emssd_compile.load(artifact)


def test_bytes_that_json_does_not_mind_are_refused_too(artifact):
    manifest = artifact / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=2))
    with pytest.raises(ArtifactError, match="not what was written"):
        emssd_compile.load(artifact)


def _replace(content: dict[str, Any], name: str, value: object) -> None:
    content[name] = value


@pytest.mark.parametrize("wrong", [None, {}, [3], [{"x": 1}], True], ids=repr)
def test_an_entry_of_another_type_is_refused(artifact, wrong):
    """Whoever wrote it: an error that says so, and nothing is opened."""
    original = (artifact / "manifest.json").read_bytes()
    for name, value in json.loads(original).items():
        if name != "sha256" and type(value) is not type(wrong):
            (artifact / "manifest.json").write_bytes(original)
            rewrite(artifact, partial(_replace, name=name, value=wrong))
            with pytest.raises(ArtifactError, match=r"cannot be read|no manifest|has format"):
                emssd_compile.load(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["inputs"][0].update(dtype="load"), "inputs cannot be read"),
        (
            lambda content: content["inputs"].pop(0),
            "describes nothing that can be driven: history or draft_tokens is not",
        ),
        (lambda content: content.update(buckets=[[1, 2]]), "buckets cannot be read"),
        (lambda content: content["files"].update({"../x": content["files"]["empty"]}), "files cannot be read"),
        (lambda content: content["details"].clear(), "is no artifact of toy: graph in its details cannot"),
        (lambda content: content.update(target="future"), "is for 'future', which is none of"),
    ],
)
def test_what_makes_no_sense_in_a_manifest_is_named(artifact, change, message):
    rewrite(artifact, change)
    with pytest.raises(ArtifactError, match=message):
        emssd_compile.load(artifact)


def test_another_version_of_the_package_that_writes_the_same_format_is_loaded(artifact):
    rewrite(artifact, lambda content: content.update(emssd_compile="99.0"))
    assert emssd_compile.load(artifact).manifest.emssd_compile == "99.0"


def test_another_format_is_named(artifact, monkeypatch):
    monkeypatch.setattr("emssd_compile.export.manifest.FORMAT", FORMAT + 1)
    with pytest.raises(ArtifactError, match=f"has format {FORMAT}, this package reads {FORMAT + 1}"):
        emssd_compile.load(artifact)
