"""`schema`: whatever a manifest says, it is refused by name, or the tokens are the right ones."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import emssd_compile
from emssd_compile.cli.inspect import describe
from emssd_compile.errors import ArtifactError, EmssdError
from emssd_compile.export import open_graph
from emssd_compile.export.folder import read_manifest
from tests.export import crafted, subjects, toy

NEW = 6


def _outcome(folder: Path, prompts: list[list[int]], expected: list[list[int]]) -> str:
    """What becomes of an artifact: `refused`, or `right`."""
    try:
        loaded = emssd_compile.load(folder)
        rows = loaded.generate(prompts, max_new_tokens=NEW)
    except (EmssdError, NotImplementedError):
        return "refused"
    # An artifact may bring another EOS: then a row ends earlier.
    right = all(row == own[: len(row)] for row, own in zip(rows, expected, strict=True))
    try:
        describe(loaded.manifest)
        loaded.explain()
    except EmssdError:
        pass
    return "right" if right else f"wrong: {rows}"


def _fuzz(artifact: Path, folder: Path, number: int, prompts: list[list[int]]) -> Counter[str]:
    shutil.copytree(artifact, folder)
    expected: Any = emssd_compile.load(artifact).generate(prompts, max_new_tokens=NEW)
    content = json.loads((artifact / "manifest.json").read_bytes())
    del content["sha256"]
    outcomes: Counter[str] = Counter()
    for edit, changed in [("none", content), *crafted.edits(content, number)]:
        (folder / "manifest.json").write_bytes(crafted.sealed(changed))
        outcome = _outcome(folder, prompts, expected)
        assert outcome in ("right", "refused"), edit
        outcomes[outcome] += 1
    return outcomes


@pytest.mark.usefixtures("toy_target")
def test_an_edited_manifest_is_refused_or_decodes_right(artifact, tmp_path):
    outcomes = _fuzz(artifact, tmp_path / "crafted", 500, toy.PROMPTS[:2])
    assert min(outcomes["right"], outcomes["refused"]) > 20


@pytest.mark.usefixtures("toy_target")
def test_an_edited_manifest_with_tables_is_refused_or_decodes_right(fast, tmp_path):
    tables = ["suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "top_logprobs"]
    artifact = toy.export(fast, tmp_path / "artifact", row_options=tables)
    outcomes = _fuzz(artifact, tmp_path / "crafted", 400, toy.PROMPTS[:2])
    assert min(outcomes["right"], outcomes["refused"]) > 8


@pytest.mark.parametrize(
    ("target", "name", "number"),
    [
        ("onnx", "draft-model", 60),
        ("aot", "lookup", 30),
        pytest.param("onnx", "lookup", 40, marks=pytest.mark.long),
        pytest.param("aot", "draft-model", 30, marks=pytest.mark.long),
    ],
)
def test_an_edited_manifest_of_a_target_is_refused_or_decodes_right(target, name, number, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime", "aot": "torch"}[target])
    prompts = [subjects.prompt(n) for n in (7, 30)]
    outcomes = _fuzz(subjects.artifact(target, name), tmp_path / "crafted", number, prompts)
    assert min(outcomes["right"], outcomes["refused"]) > 2


def _binding(content: dict[str, Any], name: str, part: str = "inputs") -> dict[str, Any]:
    return next(entry for entry in content[part] if entry["name"] == name)


def _swap_names(content: dict[str, Any], part: str = "inputs") -> None:
    _binding(content, "known", part)["name"] = "other"
    _binding(content, "lengths", part)["name"] = "known"
    _binding(content, "other", part)["name"] = "lengths"


def _resize(content: dict[str, Any], name: str, dim: int, size: int) -> None:
    for part in ("inputs", "results"):
        for entry in content[part]:
            if entry["name"] == name:
                entry["shape"][dim] = size


def _shrink(content: dict[str, Any]) -> None:
    """A vocabulary of one less: consistent in itself, and not what the graph has."""
    _resize(content, "is_eos", 0, subjects.VOCABULARY - 1)


CRAFTED = {
    "inputs of other names": _swap_names,
    "results of other names": lambda content: _swap_names(content, "results"),
    "a smaller vocabulary": _shrink,
    "a smaller cache": lambda content: _resize(content, "k_cache_0", 2, 8),
    "a cache of another dtype": lambda content: _binding(content, "k_cache_0").update(dtype="float16"),
    "a cache that is memory": lambda content: _binding(content, "k_cache_0").update(role="memory"),
    "a state that is a setting": lambda content: _binding(content, "known").update(role="setting"),
    "an input twice": lambda content: content["inputs"].append(dict(content["inputs"][0])),
    "a report that is too small": lambda content: _resize(content, "report", 1, 5),
    "no files": lambda content: content["files"].clear(),
    "more memory than there is": lambda content: _resize(content, "k_cache_0", 2, (1 << 31) - 1),
}


IN_AOT = ("inputs of other names", "a smaller cache", "a cache of another dtype", "more memory than there is")


@pytest.mark.parametrize(
    ("target", "name"), [*(("onnx", name) for name in CRAFTED), *(("aot", name) for name in IN_AOT)]
)
def test_what_does_not_fit_is_refused_before_anything_runs(target, name, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime", "aot": "torch"}[target])
    folder = shutil.copytree(subjects.artifact(target, "lookup"), tmp_path / "crafted")
    crafted.rewrite(folder, CRAFTED[name])
    with pytest.raises(EmssdError):
        emssd_compile.load(folder)
    with pytest.raises(EmssdError):
        open_graph(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shrink, "inputs: is_eos is torch.bool"),
        (_swap_names, ""),
        (lambda content: _binding(content, "draft_budget").update(dtype="int32"), "draft_budget is setting int32"),
        (
            lambda content: content["details"]["in_place"].update(k_cache_0="v_cache_0"),
            "in_place .* wrong for k_cache_0",
        ),
        (lambda content: content["details"]["in_place"].clear(), "in_place .* wrong for k_cache_0, v_cache_0"),
    ],
)
def test_a_model_that_agrees_with_a_crafted_manifest_is_compared_with_its_own_bindings(change, message, tmp_path):
    """Anyone can write what an ONNX model says of itself, too."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = shutil.copytree(subjects.artifact("onnx", "lookup"), tmp_path / "crafted")
    crafted.rewrite(folder, change)
    content = json.loads((folder / "manifest.json").read_bytes())
    model = onnx.load(folder / "step.onnx")
    (said,) = (entry for entry in model.metadata_props if entry.key == "emssd_compile.signature")
    said.value = json.dumps([content["inputs"], content["results"]])
    onnx.save(model, folder / "step.onnx")
    crafted.rehash(folder, "step.onnx")
    prompts = [subjects.prompt(7)]
    if message:
        with pytest.raises(ArtifactError, match=message):
            emssd_compile.load(folder)
    else:  # bound by name, in another order
        expected = emssd_compile.load(subjects.artifact("onnx", "lookup")).generate(prompts, max_new_tokens=NEW)
        assert emssd_compile.load(folder).generate(prompts, max_new_tokens=NEW) == expected


@pytest.mark.usefixtures("toy_target")
def test_only_the_target_that_is_asked_for_is_opened(artifact):
    with pytest.raises(ArtifactError, match="is for toy, not for onnx; nothing of it was opened"):
        emssd_compile.load(artifact, target="onnx")
    with pytest.raises(ArtifactError, match="is for toy, not for aot"):
        open_graph(artifact, target="aot")
    with pytest.raises(emssd_compile.errors.OptionError, match="unknown target 'elf'"):
        emssd_compile.load(artifact, target="elf")
    emssd_compile.load(artifact, target="toy")


@pytest.mark.usefixtures("toy_target")
def test_a_step_is_no_graph_and_a_graph_no_step(artifact, fast, tmp_path):
    crafted.rewrite(artifact, lambda content: content.update(kind="verify", layout="", guarantee=""))
    with pytest.raises(ArtifactError, match="history is a state, which a graph has none of"):
        read_manifest(artifact)
    alone = toy.export(fast, tmp_path / "alone", verify_only=True)
    crafted.rewrite(alone, lambda content: content.update(kind="step", layout="packed", guarantee="tokens"))
    with pytest.raises(ArtifactError, match="describes nothing that can be driven"):
        emssd_compile.load(alone)
