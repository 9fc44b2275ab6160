import importlib
import json
from pathlib import Path

import pytest
import torch

from bench.gpu_suite import __main__ as suite
from bench.gpu_suite import parts

ROOT = Path(parts.__file__).parents[2]


@pytest.mark.parametrize("part", [*parts.full("cpu"), *parts.smoke("cpu")], ids=lambda part: part.command[0])
def test_every_command_understands_its_arguments(part):
    module, *arguments = part.command
    if module == "pytest":
        files = [argument for argument in arguments if argument.endswith(".py")]
        assert files
        assert all((ROOT / name).exists() for name in files)
        return
    options = importlib.import_module(module).parse_arguments([*arguments, "--json", "x.json"])
    assert options.device == torch.device("cpu")
    assert str(options.json) == "x.json"


def test_both_runs_have_the_same_parts_and_the_full_one_is_on_the_gpu():
    def kinds(found):
        return [part.command[0] for part in found]

    assert kinds(parts.full("cuda")) == kinds(parts.smoke("cpu"))
    devices = {part.command[2] for part in parts.full("cuda") if part.command[1] == "--device"}
    assert devices == {"cuda"}


def test_two_parts_of_the_smoke_run_from_end_to_end(tmp_path):
    path = tmp_path / "suite.json"
    assert suite.main(["--smoke", "--parts", "kernels", "synchron", "--json", str(path)]) == 0
    found = {part["name"]: part for part in json.loads(path.read_text())["parts"]}
    assert list(found) == ["synchronisations", "attention kernels"]
    assert found["attention kernels"]["status"] == "passed"
    assert found["attention kernels"]["record"]["tables"][0]["rows"]
    if not torch.cuda.is_available():
        assert found["synchronisations"]["record"]["skipped"] == "needs a CUDA GPU"


def test_an_unknown_part_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(SystemExit, match=r"no part is called juggling; there are: tests, exactness, .*artifacts, onnx"):
        suite.main(["--smoke", "--parts", "juggling", "--json", str(tmp_path / "suite.json")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_only_the_smoke_run_is_offered(tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite.main(["--json", str(tmp_path / "suite.json")])
    assert "sees no CUDA GPU here; --smoke" in capsys.readouterr().err
