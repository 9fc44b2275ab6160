"""Commands whose standard output is closed early, or cannot hold the text."""

import os
import subprocess
import sys

TALK = """
import sys
from emssd_compile import cli

class Talk:
    def add(commands):
        commands.add_parser("talk")

    def run(arguments, notes):
        print("caf\\u00e9\\n" * 100_000)

cli.COMMANDS = {"talk": Talk}
sys.exit(cli.main(["talk"]))
"""


def _start(encoding: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", TALK]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_pipe_that_nobody_reads_any_more_is_no_error():
    with _start("utf-8") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "café\n".encode()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_an_encoding_without_the_character_is_named():
    with _start("ascii") as process:
        output, errors = process.communicate()
    assert process.returncode == 1
    assert output == b""
    assert b"set PYTHONIOENCODING=utf-8" in errors
    assert b"Traceback" not in errors
