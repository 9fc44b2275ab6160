"""The C++ example: a process without Python decodes the same tokens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.subjects import export, optimized, prompt

EXAMPLE = Path(__file__).parents[3] / "examples" / "cpp"


@pytest.fixture
def program(tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    binary = tmp_path / "decode"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([EXAMPLE / "build.sh", binary], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return binary


@pytest.fixture
def artifact():
    """With an option whose default is not 0."""
    return export("aot", "draft-model", row_options=["repetition_penalty"])


def test_decodes_the_same_tokens(program, artifact):
    new_tokens = 30
    for length in (1, 9, 40):
        ids = prompt(length)
        command = [program, artifact, str(new_tokens), *map(str, ids)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (row,) = optimized("draft-model").generate([ids], max_new_tokens=new_tokens)
        assert list(map(int, done.stdout.split())) == row


def test_the_example_is_short():
    assert len((EXAMPLE / "decode.cpp").read_text().splitlines()) <= 60
