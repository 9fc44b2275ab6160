"""`serve` on the command line."""

import copy
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from emssd_compile.cli import build_parser, main
from emssd_compile.cli.serve import KEY
from emssd_compile.errors import OptionError
from emssd_compile.serve import WARMED
from tests.serve.servers import NAME, WAIT, client, new_tokens, text_of, tokenizer, toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The toy, saved."""
    found: Path = tmp_path_factory.mktemp("models") / NAME
    copy.deepcopy(toy()).save_pretrained(found)  # which notes its dtype in it
    tokenizer().save_pretrained(found)
    return found


def test_a_saved_model_is_served_until_it_is_interrupted(folder):
    command = [sys.executable, "-m", "emssd_compile", "serve", "--model", str(folder), "--port", "0"]
    command += ["--backend", "eager", "--max-length", "64", "--max-tokens", "8"]
    environment = {**os.environ, KEY: "secret"}
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
                line = process.stderr.readline()
                assert line, said
                said += line
            while "startup complete" not in said:
                said += process.stderr.readline()
            with client(found[0], api_key="secret") as asked:
                (model,) = asked.models.list()
                assert (model.id, model.max_model_len) == (NAME, 64)
                answer = asked.completions.create(model=NAME, prompt="the cat", temperature=0)
                assert answer.choices[0].text == text_of(new_tokens("the cat", max_new_tokens=8))
            with client(found[0]) as asked, pytest.raises(openai.AuthenticationError):
                asked.models.list()
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT) == 0


def refused(capsys, *arguments: str) -> str:
    assert main(["serve", *arguments]) == 1
    said: str = capsys.readouterr().err.replace("\n", " ")
    return said


def test_what_cannot_be_served_is_said_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr("emssd_compile.cli.models.load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: the server cannot listen there" in refused(
            capsys, "--model", str(folder), "--port", port
        )
    assert "nothing is compiled for 'stop'" in refused(capsys, "--model", str(folder), "--warmup", "stop")
    assert "--max-queue -1 is out of range" in refused(capsys, "--model", str(folder), "--max-queue", "-1")
    assert "no such folder" in refused(capsys, "--model", "nowhere")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "emssd_compile[serve]"' in refused(capsys, "--model", str(folder))


def test_a_second_server_at_a_port_is_refused_while_the_first_is_still_compiling(folder, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    arguments = ["--model", str(folder), "--port", port]
    loaded: list[str] = []

    def load(*given: object) -> object:
        loaded.append("a model")
        assert len(loaded) == 1, "the second has loaded its model"
        assert f"--port {port}: the server cannot listen there" in refused(capsys, *arguments)
        raise OptionError("the first is told")

    monkeypatch.setattr("emssd_compile.cli.models.load_model", load)
    assert "the first is told" in refused(capsys, *arguments)


def test_the_help_names_all_fields_that_can_be_warmed_up(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    shown = capsys.readouterr().out
    assert all(field in shown for field in WARMED)
