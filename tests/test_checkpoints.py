"""Folders that hold a checkpoint, and those that hold none: what cannot be read is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emssd_compile.checkpoints import read_checkpoint, read_names
from emssd_compile.drafters import MLPSpeculator, load_head
from emssd_compile.drafters.mlp_speculator import MLPSpeculatorConfig
from emssd_compile.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def head() -> MLPSpeculator:
    return MLPSpeculator(MLPSpeculatorConfig(8, 20, num_heads=2))


@pytest.fixture
def folder(head, tmp_path) -> Path:
    """Of one file, of a real head."""
    head.save_pretrained(tmp_path)
    return tmp_path


def shard(folder: Path) -> list[Path]:
    """Its weights in two files and an index, as large models are published."""
    tensors = read_checkpoint(folder).tensors
    (folder / "model.safetensors").unlink()
    halves = [dict([*tensors.items()][half::2]) for half in range(2)]
    files = [folder / f"model-0000{half + 1}-of-00002.safetensors" for half in range(2)]
    for file, tensors in zip(files, halves, strict=True):
        save_file(tensors, file)
    where = {name: file.name for file, half in zip(files, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


@pytest.mark.parametrize("left", [0, 4, 8, 60, -200, -1])
def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(left, folder):
    """Before its length, in its header, before its tensors, in them."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    for read in (load_head, MLPSpeculator.from_pretrained, read_checkpoint, read_names):
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*cut off or damaged"):
            read(folder)


class Trap:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "medusa_lm_head.pt", "head.pth", "last.ckpt", "head.pkl"])
def test_a_pickle_is_refused_by_name_and_never_loaded(name, folder):
    (folder / "model.safetensors").unlink()
    torch.save(Trap(), folder / name)
    said = rf"{re.escape(name)} is a pickle, which can run code when it is loaded; convert it .*save_file"
    for read in (MLPSpeculator.from_pretrained, read_checkpoint):
        with pytest.raises(CheckpointError, match=said):
            read(folder)


def test_a_pickle_beside_safetensors_is_left_alone(head, folder):
    torch.save(Trap(), folder / "optimizer.pt")
    assert load_head(folder).state_dict().keys() == head.state_dict().keys()


def test_weights_in_several_files_are_read_together(head, folder):
    shard(folder)
    (folder / "others.safetensors").write_bytes(b"no file of the index")
    loaded = load_head(folder)
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_several_files_without_an_index_are_read_together(head, folder):
    shard(folder)
    (folder / INDEX).unlink()
    assert load_head(folder).state_dict().keys() == head.state_dict().keys()


def test_a_file_of_the_index_that_is_not_there_is_named(folder):
    shard(folder)[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors cannot be read: .*No such file"):
        load_head(folder)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": ["a.safetensors"]}, {"weight_map": {"a": "../a.safetensors"}}, {"weight_map": {"a": "a.bin"}}],
)
def test_an_index_that_names_no_files_of_the_folder_is_refused(index, folder):
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"weight_map is no map from tensors to files of the folder"):
        load_head(folder)


def test_a_tensor_in_two_files_is_refused_by_name(folder):
    """Nothing says which of them is meant."""
    tensors = read_checkpoint(folder).tensors
    name = "speculator.emb.0.weight"
    save_file({name: tensors[name] + 1}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match=rf"more\.safetensors: '{re.escape(name)}' is in another file"):
        load_head(folder)


def test_only_what_is_wanted_is_read(folder):
    found = read_checkpoint(folder, lambda name: name.startswith("speculator.ln."))
    assert {name.split(".")[1] for name in found.tensors} == {"ln"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, r"config\.json: there is no such file"),
        ("{", r"config\.json is no JSON file"),
        ("[1]", r"config\.json holds a list; it is to be a JSON object"),
    ],
)
def test_a_config_that_is_none_is_refused(config, said, folder):
    file = folder / "config.json"
    file.unlink() if config is None else file.write_text(config)
    with pytest.raises(CheckpointError, match=said):
        load_head(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no safetensors; pass the folder of a checkpoint"):
        read_checkpoint(folder)
