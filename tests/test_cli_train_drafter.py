"""`train-drafter` on the command line."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the command line loads Hugging Face models")

from emssd_compile.cli import build_parser, main, train_drafter
from tests.training.tiny_head import TinyHead
from tests.zoo import toy_model

TOKENIZER = Path(__file__).parents[1] / "examples" / "demo_model" / "target"
SOURCES = Path(__file__).parents[1] / "emssd_compile" / "step"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    toy_model("llama", vocab_size=4096, num_hidden_layers=1).save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(autouse=True)
def _heads(monkeypatch) -> None:
    monkeypatch.setattr(train_drafter, "HEADS", (TinyHead,))


def command(model: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(model), "--kind", "tiny", "--data", str(SOURCES / "pack.py"), "--out", str(out)]
    return ["train-drafter", *given, "--sizes", "width=8", "--window", "32", "--prompt-tokens", "8", *more]


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_head_its_curve_and_a_summary_are_written(folder, tmp_path, capsys):
    more = ["--epochs", "1", "--batch", "8", "--tokens", "1600", "--backend", "eager", "--device", "cpu"]
    assert main(command(folder, tmp_path, *more)) == 0
    assert {"config.json", "curve.csv", "model.safetensors", "training.json"} <= {f.name for f in tmp_path.iterdir()}
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["config"] == {"hidden_size": 64, "vocabulary": 4096, "width": 8, "depth": 2}
    assert (summary["windows"], summary["windows_held_out"], summary["steps"]) == (48, 2, 6)
    assert TinyHead.from_pretrained(tmp_path).down[0].out_features == 8
    assert "acceptance length on held-out prompts" in said(capsys)
    # the same goes on, and has nothing left to do; another is refused
    assert main(command(folder, tmp_path, *more)) == 0
    assert main(command(folder, tmp_path, *more, "--seed", "1")) == 1
    assert "seed was 0, is 1" in said(capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--kind", "oracle"], "--kind oracle: there is no such head; choose one of tiny"),
        (["--data", "nothing.txt"], "nothing.txt cannot be read"),
        (["--held-out", "nothing.txt"], "nothing.txt cannot be read"),
        (["--learning-rate", "-1"], "--learning-rate -1.0 is out of range"),
        (["--temperature", "0.5", "--no-distil"], "temperature is that of continuations"),
        (["--device", "quantum"], "--device quantum cannot be used"),
    ],
)
def test_errors_come_before_the_model_is_loaded(more, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_drafter, "load_model", None)
    assert main(command(tmp_path, tmp_path / "out", *more)) == 1
    assert words in said(capsys)
    assert not (tmp_path / "out").exists()


def test_a_size_that_the_head_does_not_have_is_refused(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path, "--sizes", "layers=3")) == 1
    assert "a TinyHead has no size 'layers'; choose from width, depth" in said(capsys)


def test_sizes_are_read_as_json_or_as_words(capsys):
    given = command(Path("m"), Path("o"), "--sizes", "width=8", "taps=[1, -2]", "mode=fast")
    assert dict(build_parser().parse_args(given).sizes) == {"width": 8, "taps": (1, -2), "mode": "fast"}
    with pytest.raises(SystemExit):
        build_parser().parse_args([*given, "--sizes", "width"])
    assert "'width' is no NAME=VALUE" in capsys.readouterr().err
