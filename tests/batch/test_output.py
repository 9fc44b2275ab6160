"""What is done is kept, whole, and told from what another command has done."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emssd_compile.batch.lines import Index, Line
from emssd_compile.batch.output import Output, fingerprint
from emssd_compile.errors import OptionError

JOB: dict[str, object] = {"--input": "aa", "--model": "bb", "--max-new-tokens": 8, "--stop": None}


def _index(count: int = 4) -> Index:
    index = Index()
    for number in range(1, count + 1):
        index.add(Line(number, number - 1, "", f"p{number}"))
    return index


def _result(number: int) -> dict[str, object]:
    return {"id": f"p{number}", "completion": "é\ud83d"}


def _open(path: Path, drawn: int = 1, job: dict[str, object] = JOB) -> contextlib.closing[Output]:
    return contextlib.closing(Output(path, job, {"--seed": drawn}))


def _begin(path: Path, *numbers: int) -> None:
    with _open(path) as output:
        output.resume(_index())
        for number in numbers:
            output.write(_result(number))


@pytest.mark.parametrize("torn", [b"", b'{"id": "p4"', b'{"id": "p4", "completion": "\xc3', b"\0" * 9])
def test_it_goes_on_where_it_was_and_decodes_again_what_was_torn(tmp_path, torn):
    path = tmp_path / "out.jsonl"
    _begin(path, 3, 1)
    with (tmp_path / "out.jsonl.partial").open("ab") as file:
        file.write(torn)
    index = _index()
    with _open(path) as output:
        assert output.resume(index) == 2
        assert [number for number in range(1, 5) if not index.is_done(f'"p{number}"')] == [2, 4]
        for number in (4, 2):
            output.write(_result(number))
        assert not path.exists()
        output.finish()
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [_result(n) for n in (3, 1, 4, 2)]
    path.read_text(encoding="utf-8")
    with _open(path) as output:
        assert output.is_complete
    assert {each.name for each in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.job"}


@pytest.mark.parametrize("is_complete", [False, True])
def test_the_output_of_another_command_is_refused_with_what_differs(tmp_path, is_complete):
    path = tmp_path / "out.jsonl"
    _begin(path, 1)
    if is_complete:
        (tmp_path / "out.jsonl.partial").replace(path)
    with pytest.raises(OptionError, match="--input held something else; --max-new-tokens was 8, and is 9"):
        Output(path, {**JOB, "--input": "bb", "--max-new-tokens": 9}, {"--seed": 2})
    with pytest.raises(OptionError, match=r"--stop was null, and is \[\"x\"\]\. Give"):
        Output(path, {**JOB, "--stop": ["x"]}, {"--seed": 2})
    with _open(path) as output:
        assert output.is_complete == is_complete


def test_what_was_drawn_holds_on(tmp_path):
    _begin(tmp_path / "out.jsonl", 1)
    with _open(tmp_path / "out.jsonl", drawn=2) as output:
        assert output.job["--seed"] == 1


def test_a_job_of_which_nothing_is_there_any_more_is_no_hindrance(tmp_path):
    path = tmp_path / "out.jsonl"
    _begin(path, 1)
    (tmp_path / "out.jsonl.partial").unlink()
    index = _index()
    with _open(path, job={**JOB, "--stop": ["x"]}) as output:
        assert output.resume(index) == 0
        output.write(_result(1))
    with pytest.raises(OptionError, match="--stop was"):
        Output(path, JOB, {})


def test_a_damaged_job_file_is_not_believed(tmp_path):
    _begin(tmp_path / "out.jsonl", 1)
    (tmp_path / "out.jsonl.job").write_text('{"--in')
    with pytest.raises(OptionError, match=r"out.jsonl.partial exists, and no batch says"):
        Output(tmp_path / "out.jsonl", JOB, {})


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
def test_a_file_that_no_batch_wrote_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OptionError, match=f"{name} exists, and no batch says what is in it"):
        Output(tmp_path / "out.jsonl", JOB, {})
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("mine", ['"precious"\n', "[1]", '{"--input": 1}', "text"])
def test_nor_is_one_in_the_place_of_the_job(tmp_path, mine):
    (tmp_path / "out.jsonl.job").write_text(mine)
    with pytest.raises(OptionError, match=r"out.jsonl.job exists, and no batch has written it"):
        Output(tmp_path / "out.jsonl", JOB, {})
    assert (tmp_path / "out.jsonl.job").read_text() == mine


def test_a_command_without_a_result_does_not_bind_the_next(tmp_path):
    _begin(tmp_path / "out.jsonl")
    with _open(tmp_path / "out.jsonl", job={**JOB, "--stop": ["x"]}) as output:
        assert output.resume(_index()) == 0
        output.write(_result(1))
    with pytest.raises(OptionError, match="--stop was"):
        Output(tmp_path / "out.jsonl", JOB, {})


@pytest.mark.parametrize("line", ['{"id": "p9"}', '{"id": "p1"}', "[]", "mine"])
def test_a_line_that_no_batch_wrote_is_refused(tmp_path, line):
    _begin(tmp_path / "out.jsonl", 1)
    with (tmp_path / "out.jsonl.partial").open("a") as file:
        file.write(line + "\n")
    with (
        _open(tmp_path / "out.jsonl") as output,
        pytest.raises(OptionError, match="line 2, is the result of no prompt"),
    ):
        output.resume(_index())


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl", reason="locks are those of Unix")
    with _open(tmp_path / "out.jsonl") as output:
        output.resume(_index())
        with pytest.raises(OptionError, match="another process is writing it"):
            Output(tmp_path / "out.jsonl", JOB, {})


FULL = """
import resource, signal, sys
from pathlib import Path
from emssd_compile.errors import OptionError
from tests.batch.test_output import _index, _open, _result
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails instead
with _open(Path(sys.argv[1])) as output:
    output.resume(_index())
    output.write(_result(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (70,) * 2)
    try:
        output.write(_result(2))
    except OptionError as error:
        print(error)
"""


def test_a_full_disk_is_named_and_costs_nothing_that_was_done(tmp_path):
    pytest.importorskip("resource", reason="files are limited by the operating system")
    root, path = Path(__file__).parents[2], tmp_path / "out.jsonl"
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert "cannot be written: File too large; what is done is kept: mend that" in done.stdout, done.stderr
    assert (tmp_path / "out.jsonl.partial").stat().st_size == 70, "torn"
    with _open(path) as output:
        assert output.resume(_index()) == 1


def test_a_model_is_what_its_files_say(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("more")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("trained")
    assert fingerprint(tmp_path) != before
    with pytest.raises(OptionError, match="cannot be read"):
        fingerprint(tmp_path / "nothing")
