import csv
import json
import sys

import pytest

from emssd_compile.errors import OptionError
from emssd_compile.training import report
from emssd_compile.training.work import Progress

PROGRESS = Progress([[3.0, 0.1, 0.2, 0.3, 0.4], [2.0, 0.5, 0.6, 0.7, 0.8]], {2: [2.5, 0.4, 0.3, 0.6, 0.5]})


def test_the_curve_has_a_line_for_each_step_and_each_look_at_what_is_held_out(tmp_path):
    report.write_curve(tmp_path, PROGRESS, lambda step: 0.1 * (step + 1))
    lines = [*csv.DictReader((tmp_path / "curve.csv").read_text().splitlines())]
    assert [(line["step"], line["windows"], line["loss"]) for line in lines] == [
        ("1", "train", "3.0"),
        ("2", "train", "2.0"),
        ("2", "held out", "2.5"),
    ]
    assert [float(lines[0][name]) for name in ("learning_rate", "top1_1", "top1_2", "top5_1", "top5_2")] == [
        pytest.approx(value) for value in (0.1, 0.1, 0.2, 0.3, 0.4)
    ]


def test_a_picture_if_matplotlib_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert report.plot(tmp_path, PROGRESS, "a head")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not report.plot(tmp_path, PROGRESS, "a head")


def test_a_summary_is_json(tmp_path):
    report.write_summary(tmp_path, {"steps": 2})
    assert json.loads((tmp_path / "training.json").read_text()) == {"steps": 2}


def test_tensorboard_is_asked_for_by_name_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match="TensorBoard is not installed; pip install tensorboard"):
        report.open_tensorboard(tmp_path)


def test_tensorboard_gets_each_step_from_where_a_run_goes_on(tmp_path, monkeypatch):
    written: list[tuple[object, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    report.open_tensorboard(tmp_path)(PROGRESS)
    assert written[0] == (str(tmp_path / "tensorboard"), 2)
    assert ("loss/training", 2.0, 2) in written
    assert ("top5_2/held out", 0.5, 2) in written
