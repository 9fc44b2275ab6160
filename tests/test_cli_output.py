"""Commands that are broken off, whose standard output is closed early or cannot hold the text, and what they log."""

import os
import signal
import subprocess
import sys

COMMAND = """
import logging, signal, sys, time
from emssd_compile import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, which ignores it

class Command:
    def add(commands):
        commands.add_parser("command")

    def run(arguments, notes):
        {run}

cli.COMMANDS = {{"command": Command}}
sys.exit(cli.main(["command"]))
"""
TALK = r'print("caf\u00e9\n" * 100_000)'
WORK = 'logging.getLogger("emssd_compile.ops").warning("it is slow"); print("began", flush=True); time.sleep(60)'


def _start(run: str, encoding: str = "utf-8") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", COMMAND.format(run=run)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_pipe_that_nobody_reads_any_more_is_no_error():
    with _start(TALK) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "café\n".encode()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_an_encoding_without_the_character_is_named():
    with _start(TALK, "ascii") as process:
        output, errors = process.communicate()
    assert process.returncode == 1
    assert output == b""
    assert b"set PYTHONIOENCODING=utf-8" in errors
    assert b"Traceback" not in errors


def test_what_is_broken_off_ends_quietly_and_warnings_are_on_standard_error():
    with _start(WORK) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"began\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == b"WARNING: it is slow\n"
