"""The ways that are compared, the programs they belong to, and the environments that those are installed in."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from emssd_compile.errors import OptionError
from emssd_compile.files import cache_folder


@dataclass(frozen=True)
class Peer:
    """A program that decodes.

    Attributes:
        worker: the module that runs it.
        requirements: what pip is to install, in an environment of its own; nothing for what runs in ours.
    """

    worker: str
    requirements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """A peer and how it decodes.

    Attributes:
        peer: a name of `PEERS`.
        lookup: whether it drafts by prompt lookup.
        candidate: a name of `bench.candidates.CANDIDATES`, where the peer is this project.
    """

    peer: str
    lookup: bool = False
    candidate: str | None = None


PEERS = {
    "here": Peer("bench.peers.workers.candidate"),
    "openvino": Peer("bench.peers.workers.openvino", ("openvino-genai", "safetensors")),
    "onnxruntime": Peer("bench.peers.workers.onnxruntime", ("onnxruntime-genai", "onnx", "onnx_ir")),
    "llama_cpp": Peer("bench.peers.workers.llama_cpp", ("llama-cpp-python", "gguf", "safetensors")),
    "ctranslate2": Peer("bench.peers.workers.ctranslate2", ("ctranslate2",)),
}
INSTALLABLE = [name for name, peer in PEERS.items() if peer.requirements]
REFERENCE = "hf_generate"
OURS = {False: "ours_none", True: "ours_auto"}
"""Ours, by whether it looks up."""
WAYS = {
    REFERENCE: Way("here", candidate=REFERENCE),
    OURS[False]: Way("here", candidate=OURS[False]),
    OURS[True]: Way("here", lookup=True, candidate=OURS[True]),
    "openvino": Way("openvino"),
    "openvino_lookup": Way("openvino", lookup=True),
    "onnxruntime": Way("onnxruntime"),
    "llama_cpp": Way("llama_cpp"),
    "ctranslate2": Way("ctranslate2"),
}


def install(name: str) -> None:
    """Make the environment of a peer, or bring it up to date.

    Raises:
        OptionError: it cannot be installed; pip has said why.
    """
    folder, requirements = _environment(name), PEERS[name].requirements
    commands: tuple[list[str | Path], ...] = (
        [sys.executable, "-m", "venv", folder],
        [_python(folder), "-m", "pip", "install", "-U", *requirements],
    )
    for command in commands:
        if subprocess.run(command, check=False).returncode:
            raise OptionError(f"{name} was not installed: {' '.join(map(str, command))} failed")
    (folder / "installed").touch()


def interpreter(name: str) -> Path:
    """The Python that a peer runs in. Raises OptionError if it is not installed."""
    if not PEERS[name].requirements:
        return Path(sys.executable)
    folder = _environment(name)
    if not (folder / "installed").exists():
        raise OptionError(f"not installed: python -m bench.peers --install {name}")
    return _python(folder)


def _environment(name: str) -> Path:
    return cache_folder() / "peers" / name


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
