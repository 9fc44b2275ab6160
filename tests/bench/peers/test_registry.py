"""Environments of peers: made on request, and used when they are whole."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers import registry
from emssd_compile.errors import OptionError


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """What `install` runs, and the status that the last command shall have."""
    monkeypatch.setenv("EMSSD_CACHE_DIR", str(tmp_path))
    ran: list[list[str]] = []
    status = {"pip": 0}

    def run(command, check):
        ran.append([str(part) for part in command])
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, status["pip"] if "pip" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return ran, status


def test_a_peer_is_there_when_all_of_it_is_installed(pip, tmp_path):
    ran, status = pip
    with pytest.raises(OptionError, match=r"not installed: python -m bench\.peers --install ctranslate2"):
        registry.interpreter("ctranslate2")
    status["pip"] = 1
    with pytest.raises(OptionError, match=r"ctranslate2 was not installed: .* pip install -U ctranslate2 failed"):
        registry.install("ctranslate2")
    with pytest.raises(OptionError, match="not installed"):
        registry.interpreter("ctranslate2")
    (tmp_path / "peers" / "ctranslate2").rmdir()
    status["pip"] = 0
    registry.install("ctranslate2")
    python = registry.interpreter("ctranslate2")
    assert python == tmp_path / "peers" / "ctranslate2" / "bin" / "python"
    assert ran[-1] == [str(python), "-m", "pip", "install", "-U", "ctranslate2"]


def test_what_runs_here_needs_no_environment():
    assert registry.interpreter("here") == Path(sys.executable)
