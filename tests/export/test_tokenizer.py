"""A tokenizer in an artifact: the same afterwards, compared as all files are, and nothing that a target reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="tokenizers are its")

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.export import load_tokenizer
from emssd_compile.export.folder import Files, read_manifest
from tests.export import toy

TEMPLATE = "{{ messages[0]['content'] }} 2"


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({str(token): token for token in range(16)}, "0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, eos_token="3")


@pytest.fixture
def artifact(fast, tokenizer, toy_target, tmp_path):
    return toy.export(fast, tmp_path / "artifact", tokenizer=tokenizer)


def test_it_is_the_same_afterwards(artifact, tokenizer):
    loaded = load_tokenizer(artifact)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.chat_template, loaded.eos_token) == (TEMPLATE, "3")


def test_its_files_are_compared_as_all_are(artifact):
    entries = read_manifest(artifact).files
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} < entries.keys()
    path = artifact / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"5"', '"x"'))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is not what was written"):
        load_tokenizer(artifact)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is not what was written"):
        Files(artifact, entries)


@pytest.mark.parametrize("written", ["{}", "[]", "3"])
def test_what_transformers_cannot_make_one_of_is_said(fast, toy_target, tokenizer, monkeypatch, tmp_path, written):
    save = type(tokenizer).save_pretrained

    def damaged(self: object, folder: Path) -> None:
        save(self, folder)
        (folder / "tokenizer.json").write_text(written)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", damaged)
    artifact = toy.export(fast, tmp_path / "artifact", tokenizer=tokenizer)
    with pytest.raises(ArtifactError, match="transformers cannot load"):
        load_tokenizer(artifact)


def test_where_there_is_none_that_is_said(fast, toy_target, tmp_path):
    with pytest.raises(ArtifactError, match="holds no tokenizer; export again"):
        load_tokenizer(toy.export(fast, tmp_path / "artifact"))


def test_what_cannot_be_saved_is_refused(fast, toy_target, monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "write", None)
    with pytest.raises(OptionError, match="has no save_pretrained"):
        toy.export(fast, tmp_path / "artifact", tokenizer=SimpleNamespace())
    assert not (tmp_path / "artifact").exists()
