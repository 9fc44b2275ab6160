import json
from typing import Any

import pytest

from emssd_compile.errors import CheckpointError, OptionError
from emssd_compile.training.work import WorkFolder
from tests.training.toys import trainer


def test_the_same_command_goes_on_and_another_is_refused_by_what_differs(tmp_path):
    command = {"epochs": 2, "sizes": {"taps": (1, 2)}, "seed": 0}
    WorkFolder(tmp_path).begin(command)
    WorkFolder(tmp_path).begin(command)
    with pytest.raises(OptionError, match=r"another command: epochs was 2, is 3; seed was 0, is 1\. Give the command"):
        WorkFolder(tmp_path).begin(command | {"epochs": 3, "seed": 1})


def test_one_process_writes(tmp_path):
    WorkFolder(tmp_path).begin({"epochs": 2}, writes=False)
    WorkFolder(tmp_path).begin({"epochs": 3})


def test_a_folder_that_holds_another_head_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OptionError, match="holds a checkpoint that was not trained there; pass a new folder"):
        WorkFolder(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="file/head cannot be written: Not a directory"):
        WorkFolder(tmp_path / "file" / "head")


@pytest.mark.parametrize("damage", ["cut off", "another head"])
def test_a_checkpoint_that_cannot_be_used_is_named(damage, target, tmp_path):
    trainer(target, tmp_path, epochs=1).run()
    file = tmp_path / "work" / "checkpoint.safetensors"
    given: dict[str, Any] = {}
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        given = {"sizes": {"width": 5}}
    with pytest.raises(CheckpointError, match=r"(?s)checkpoint.safetensors cannot be used: .*remove it"):
        trainer(target, tmp_path, epochs=1, **given).run()


def test_nothing_is_pickled(target, tmp_path):
    trainer(target, tmp_path, epochs=1).run()
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["checkpoint.safetensors"]
    header = (tmp_path / "work" / "checkpoint.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert {"curve", "held_out", "head.up.0.weight", "exp_avg.up.0.weight", "step.up.0.weight"} <= names.keys()
