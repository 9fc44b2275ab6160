"""The tokenizer that may lie in an artifact, in a folder of its own; no target reads it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.export.folder import Files, read_manifest

FOLDER = "tokenizer"


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of an artifact is one of its tokenizer."""
    return name.startswith(f"{FOLDER}/")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises OptionError unless it can be saved."""
    if not callable(getattr(tokenizer, "save_pretrained", None)):
        raise OptionError(f"tokenizer={tokenizer!r} has no save_pretrained; pass a tokenizer of transformers")


def save_tokenizer(tokenizer: Any, artifact: Path) -> None:
    """Write it into an artifact."""
    tokenizer.save_pretrained(artifact / FOLDER)


def load_tokenizer(artifact: str | Path) -> Any:
    """The tokenizer that lies in an artifact; no code that comes with one is run.

    Raises:
        ArtifactError: there is none, its files are not what was written, or transformers cannot make one of them.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ArtifactError('a tokenizer needs transformers: pip install "emssd_compile[hf]"') from error
    artifact = Path(artifact)
    entries = {name: entry for name, entry in read_manifest(artifact).files.items() if is_of_tokenizer(name)}
    if not entries:
        raise ArtifactError(f"{artifact} holds no tokenizer; export again with tokenizer=...")
    with Files(artifact, entries) as files, tempfile.TemporaryDirectory() as folder:
        for name in files.names:  # what was compared, whatever is put in its place in the meantime
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files.read(name))
        try:
            return AutoTokenizer.from_pretrained(Path(folder, FOLDER), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # damaged files end in errors of any kind
            told = f"{type(error).__name__}: {error}"
            raise ArtifactError(f"transformers cannot load {artifact / FOLDER}: {told}") from error
