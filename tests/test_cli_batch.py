"""`batch`: each prompt once in the output, whatever happens to the process, with the model's own text."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the command line loads Hugging Face models")

from transformers import AutoTokenizer

from emssd_compile.batch.output import Output
from emssd_compile.cli import batch, main
from emssd_compile.cli.models import load_model, open_decoder
from emssd_compile.step.paging import BLOCK_SIZE
from tests.test_session_docs import COMMANDS
from tests.zoo import toy_model

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "examples" / "demo_model" / "target"
NEW_TOKENS = 9
WAIT = 120  # seconds after which a test that hangs has failed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A toy with the demo model's tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "target"
    toy_model("llama", vocab_size=4096, num_hidden_layers=1).save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }} A:{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def _command(model: Path, folder: Path, *options: str) -> list[str]:
    files = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    return ["batch", "--model", str(model), *files, "--backend", "eager", *options]


def _write(folder: Path, lines: list[Any]) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def _generated(model: Path, folder: Path, capsys: Any, *options: str) -> list[dict[str, Any]]:
    """What `generate` makes of the same prompts."""
    given = ["--prompt-file", str(folder / "in.jsonl"), "--format", "jsonl", "--backend", "eager"]
    capsys.readouterr()
    assert main(["generate", "--model", str(model), *given, *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_prompts_of_every_kind_get_what_generate_gives_them(model, tmp_path, capsys):
    lines = [
        "def add(a, b):\n\treturn",
        {"custom_id": "é", "text": "import os, sys\n", "tag": [1]},
        {"id": 70, "input_ids": [5, 6, 7]},
        [9, 8, 7, 6],
        {"id": "chat", "messages": [{"role": "user", "content": "x = 1"}]},
    ]
    _write(tmp_path, lines)
    options = ["--max-new-tokens", str(NEW_TOKENS), "--chat", "--max-batch", "2"]
    assert main(_command(model, tmp_path, *options)) == 0
    assert capsys.readouterr().out == "", "standard output is for results"
    found = {line["id"]: line for line in _results(tmp_path)}
    assert {*found} == {1, "é", 70, 4, "chat"}
    for line, expected in zip([1, "é", 70, 4, "chat"], _generated(model, tmp_path, capsys, *options), strict=True):
        assert found[line] == expected | {"id": line, "finish_reason": "length"}
    assert len(found[70]["completion_ids"]) == NEW_TOKENS
    assert main(_command(model, tmp_path, *options)) == 0
    assert "is complete: nothing is left to do" in capsys.readouterr().err.replace("\n", " ")


def test_what_is_drawn_and_stopped_is_as_generate_does_it(model, tmp_path, capsys):
    _write(tmp_path, ["def add(a, b):", "import os", "x = 1"])
    options = ["--max-new-tokens", "20", "--temperature", "2.0", "--seed", "3"]
    whole = [line["completion"] for line in _generated(model, tmp_path, capsys, *options)]
    stop = whole[0][5:8]
    assert not any(stop in text for text in whole[1:])
    assert main(_command(model, tmp_path, *options, "--stop", stop)) == 0
    found = {line["id"]: line for line in _results(tmp_path)}
    assert [found[n]["completion"] for n in (2, 3)] == whole[1:]
    assert found[1]["finish_reason"] == "stop"
    assert whole[0].startswith(found[1]["completion"])
    assert stop in found[1]["completion"]


BAD = [
    {"id": "a", "text": "x = 1"},
    {"id": "b", "text": ""},
    {"id": "c", "input_ids": [4096]},
    {"id": "d", "text": "x" * 900},
]


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        (BAD[:2], [], "line 2 is empty"),
        ([BAD[0], BAD[2]], [], "line 2: token 4096 is not in the vocabulary of 4096"),
        ([BAD[3]], ["--max-length", "64"], "new ones are more than the 64 of --max-length"),
        ([BAD[0], BAD[3]], ["--kv-tokens", "64"], "of 64 tokens, and the pool of --kv-tokens 64 has 1"),
        ([BAD[0], BAD[0]], ["--skip-errors"], 'line 2 has the id "a", as line 1 has'),
        ([{"id": 3, "prompt": "x"}], [], "line 1: neither a string nor an object"),
        ([BAD[0]], ["--top-k", "3"], "--top-k is for tokens that are drawn"),
        ([BAD[0]], ["--ray-address", "auto"], "--ray-address are for --workers N"),
    ],
)
def test_what_is_wrong_is_said_before_any_work_and_leaves_no_output(
    model, tmp_path, capsys, monkeypatch, lines, options, said
):
    monkeypatch.setattr("emssd_compile.cli.models.load_model", None)
    _write(tmp_path, lines)
    assert main(_command(model, tmp_path, *options)) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_bad_lines_are_skipped_when_asked_and_told_under_their_ids(model, tmp_path, capsys):
    _write(tmp_path, BAD)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("no JSON\n")
    options = ["--max-new-tokens", str(NEW_TOKENS), "--max-length", "64", "--skip-errors"]
    assert main(_command(model, tmp_path, *options)) == 0
    found = {line["id"]: line for line in _results(tmp_path)}
    assert {name: line["finish_reason"] for name, line in found.items()} == {
        "a": "length",
        "b": "error",
        "c": "error",
        "d": "error",
        5: "error",
    }
    assert "line 2 is empty" in found["b"]["error"]
    assert "completion" not in found["d"]


def test_an_input_that_changes_meanwhile_is_not_said_to_be_done(model, tmp_path, capsys, monkeypatch):
    _write(tmp_path, [{"text": "x = 1"}, {"text": "y = 2"}])

    def shortened(*given):
        _write(tmp_path, [{"text": "x = 1"}])
        return load_model(*given)

    monkeypatch.setattr("emssd_compile.cli.models.load_model", shortened)
    assert main(_command(model, tmp_path, "--max-new-tokens", "2")) == 1
    assert "was changed while it was read" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_changed_input_or_another_option_is_refused(model, tmp_path, capsys):
    _write(tmp_path, ["x = 1"])
    assert main(_command(model, tmp_path, "--max-new-tokens", "2")) == 0
    _write(tmp_path, ["x = 2"])
    assert main(_command(model, tmp_path, "--max-new-tokens", "3")) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert "--input held something else; --max-new-tokens was 2, and is 3" in said


def test_an_interrupted_command_says_how_to_go_on(model, tmp_path, capsys, monkeypatch):
    _write(tmp_path, ["x = 1", "x = 2", "x = 3"])
    write, written = Output.write, list[object]()

    def interrupted(self: Output, result: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(result["id"])
        write(self, result)

    monkeypatch.setattr(Output, "write", interrupted)
    with pytest.raises(SystemExit) as exit:
        main(_command(model, tmp_path, "--max-new-tokens", "2"))
    assert exit.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.undo()
    assert main(_command(model, tmp_path, "--max-new-tokens", "2")) == 0
    assert [line["id"] for line in _results(tmp_path)][:1] == written
    assert sorted(line["id"] for line in _results(tmp_path)) == [1, 2, 3]


def test_a_field_called_error_is_the_users_own_unless_an_earlier_try_wrote_it(model, tmp_path, monkeypatch):
    own = [{"id": f"own{n}", "text": f"x = {n}", "error": {"bars": n}} for n in range(2)]
    _write(tmp_path, [*own, {"id": "again", "text": "y = 1", "finish_reason": "error", "error": "no memory"}])
    write, written = Output.write, list[object]()

    def interrupted(self: Output, result: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(result)
        write(self, result)

    monkeypatch.setattr(Output, "write", interrupted)
    with pytest.raises(SystemExit):
        main(_command(model, tmp_path, "--max-new-tokens", "2"))
    monkeypatch.undo()
    assert main(_command(model, tmp_path, "--max-new-tokens", "2")) == 0
    results = _results(tmp_path)
    assert results[:1] == written, "what was done is not done again"
    found = {line["id"]: line for line in results}
    assert len(results) == len(found) == 3
    assert {line["finish_reason"] for line in results} == {"length"}
    assert [found[line["id"]]["error"] for line in own] == [line["error"] for line in own]
    assert "error" not in found["again"]


def test_what_prompts_begin_with_is_read_once_with_a_prefix_cache(model, tmp_path, capsys, monkeypatch):
    opened: list[Any] = []

    def kept(arguments: Any) -> Any:
        opened.append(open_decoder(arguments))
        return opened[-1]

    monkeypatch.setattr(batch, "open_decoder", kept)
    system = [*range(5, 5 + BLOCK_SIZE)]
    _write(tmp_path, [[*system, n] for n in range(1, 4)])
    options = ["--max-new-tokens", "5", "--max-batch", "1"]
    assert main(_command(model, tmp_path, *options, "--prefix-cache")) == 0
    found = {line["id"]: line["completion_ids"] for line in _results(tmp_path)}
    expected = _generated(model, tmp_path, capsys, *options)
    assert [found[n] for n in (1, 2, 3)] == [line["completion_ids"] for line in expected]
    assert opened[0].stats.prefix_cache_hits == 2 * BLOCK_SIZE
    assert main(_command(model, tmp_path, *options, "--prefix-cache", "--deterministic")) == 0, "nothing is left to do"
    (tmp_path / "out.jsonl").unlink()
    assert main(_command(model, tmp_path, *options, "--prefix-cache", "--deterministic")) == 1
    assert "--prefix-cache makes the sizes of steps depend" in capsys.readouterr().err.replace("\n", " ")


def test_an_artifact_decodes_the_lines_too(model, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "artifact"
    command = ["export", "--model", str(model), "--to", "onnx", "--out", str(out), "--no-check"]
    assert main([*command, "--max-batch", "2", "--max-length", "64"]) == 0
    _write(tmp_path, ["def add(a, b):", [9, 8, 7, 6], "x = 1"])
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    of_artifact = ["batch", "--model", str(out), *files, "--max-new-tokens", str(NEW_TOKENS)]
    assert main([*of_artifact[:-1], "90"]) == 1
    assert "new ones are more than the 64 of" in capsys.readouterr().err.replace("\n", " ")
    assert main([*of_artifact, "--temperature", "1.0"]) == 1
    assert "do_sample=True is not supported" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "out.jsonl.job").unlink()
    assert main(of_artifact) == 0
    found = {line["id"]: line["completion"] for line in _results(tmp_path)}
    expected = _generated(model, tmp_path, capsys, "--max-new-tokens", str(NEW_TOKENS))
    assert [found[n] for n in (1, 2, 3)] == [line["completion"] for line in expected]


def test_the_command_of_the_docs(model, tmp_path, capsys, monkeypatch):
    command = next(each for each in COMMANDS if " batch " in each)
    (tmp_path / "prompts.jsonl").write_text('"x = 1"\n')
    (tmp_path / "llama").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command)[1:], "--backend", "eager"]) == 0
    assert [line["num_new_tokens"] for line in _results(tmp_path)] == [32]


@pytest.mark.long
def test_on_ray(model, tmp_path, capsys):
    pytest.importorskip("ray.data", reason="not installed: pip install 'emssd_compile[ray]'")
    _write(tmp_path, [{"id": f"p{n}", "text": f"x{n} = {n}"} for n in range(40)])
    options = ["--max-new-tokens", "5", "--max-batch", "2", "--temperature", "1.5", "--seed", "3"]
    assert main(_command(model, tmp_path, *options, "--workers", "2")) == 0
    texts = {line["id"]: line["completion"] for line in _results(tmp_path)}
    assert len(_results(tmp_path)) == 40
    for line in _generated(model, tmp_path, capsys, *options):
        assert texts[line["id"]] == line["completion"]
    assert {each.name for each in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.job"}


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS = ("before the first", "in the middle", "around the end")


@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.long)])
def test_killed_at_random_moments_each_prompt_is_there_once(model, tmp_path, capsys, kills):
    """While it loads and compiles, while it decodes, while it ends."""
    count, draw, seen = 25 * kills, random.Random(kills), list[int]()
    _write(tmp_path, [{"id": f"p{n}", "text": f"x{n} = {n}"} for n in range(count)])
    for number in range(kills):
        seen.append(_kill(model, tmp_path, MOMENTS[number % 3], count, draw))
    assert 0 < seen[1] < count
    _check_each_is_there_once(model, tmp_path, capsys, count)


@pytest.mark.long
def test_killed_with_its_workers_each_prompt_is_there_once(model, tmp_path, capsys):
    pytest.importorskip("ray.data", reason="not installed: pip install 'emssd_compile[ray]'")
    count = 60
    _write(tmp_path, [{"id": f"p{n}", "text": f"x{n} = {n}"} for n in range(count)])
    assert 0 < _kill(model, tmp_path, "in the middle", count, random.Random(1), "--workers", "2") < count
    _check_each_is_there_once(model, tmp_path, capsys, count)


OPTIONS = ("--max-new-tokens", "12", "--max-batch", "2")


def _kill(model: Path, folder: Path, moment: str, count: int, draw: random.Random, *options: str) -> int:
    """Start the command, kill it some time and tear what it wrote; returns how many results there were."""
    command = [sys.executable, "-m", "emssd_compile", *_command(model, folder, *OPTIONS, *options)]
    partial = folder / "out.jsonl.partial"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    if moment == "before the first":
        time.sleep(draw.random() * 8)
    else:
        aim = _lines(partial) + draw.randint(1, 12) if moment == "in the middle" else count - draw.randint(0, 2)
        ends = time.monotonic() + WAIT
        while _lines(partial) < aim and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)
    done = _lines(partial)
    if partial.exists():
        with partial.open("ab") as file:
            file.write(b'{"id": "p0", "te'[: draw.randrange(17)])  # what a write that was torn leaves
    return done


def _check_each_is_there_once(model: Path, folder: Path, capsys: Any, count: int) -> None:
    assert main(_command(model, folder, *OPTIONS)) == 0
    found = _results(folder)
    assert sorted(line["id"] for line in found) == sorted(f"p{n}" for n in range(count))
    texts = {line["id"]: line["completion"] for line in found}
    for line in _generated(model, folder, capsys, *OPTIONS):
        assert texts[line["id"]] == line["completion"]
