"""Checkpoints of draft heads: a folder with `config.json` and safetensors. A pickle is never loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from emssd_compile.errors import CheckpointError
from emssd_compile.files import write_whole
from emssd_compile.numeric import shown

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_REQUIRED: Any = object()

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        folder: where it was read.
        config: of `config.json`.
        tensors: by the names that they have there.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, name: str, kind: type[T], default: T = _REQUIRED, *, within: Mapping[str, Any] | None = None) -> T:
        """An entry of the config; a whole number is a float, too, if one is asked for.

        Args:
            name: of the entry; dots lead into entries that are dicts.
            kind: what it has to be an instance of.
            default: where there is none, or null.
            within: where to look, if not in the config as a whole.

        Raises:
            CheckpointError: it is missing and has no default, or is of another kind.
        """
        value: Any = self.config if within is None else within
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None and default is not _REQUIRED:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if value is None or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            what = "is missing" if value is None else f"is {shown(value)}"
            raise CheckpointError(f"{self.folder / CONFIG}: {name} {what}; it is to be of type {kind.__name__}")
        return value


def read_checkpoint(folder: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> Checkpoint:
    """Read the config, and the tensors whose names are wanted, on the CPU and in the dtypes they were saved in.

    Raises:
        CheckpointError: there is no such folder, a file is missing or damaged, or there are pickles only.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        with _opened(file) as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(f"{file}: {twice[0]!r} is in another file of the folder, too; remove one of them")
        tensors |= found
    return Checkpoint(folder, config, tensors)


def read_names(folder: str | Path) -> tuple[dict[str, Any], frozenset[str]]:
    """The config of a checkpoint and the names of its tensors in safetensors, which are not read.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    config, names = read_json(folder / CONFIG), set[str]()
    for file in _weight_files(folder) if any(folder.glob("*.safetensors")) else []:
        with _opened(file) as opened:
            names.update(opened.keys())
    return config, frozenset(names)


def write_checkpoint(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files; each of them is whole at any time. The config, without which nothing is read, comes last.

    Raises:
        CheckpointError: the folder holds other weights, which would be read with these or instead.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    others = [
        file for file in (*folder.glob("*.safetensors"), folder / INDEX) if file.name != WEIGHTS and file.exists()
    ]
    if others:
        raise CheckpointError(f"{folder} holds other weights, as {sorted(others)[0].name}; choose another folder")
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(folder / WEIGHTS, save(held, metadata={"format": "pt"}))
    write_whole(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def read_json(file: Path) -> dict[str, Any]:
    """A dict in a JSON file. Raises CheckpointError if the file is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file; pass the folder of a checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no JSON file: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}; it is to be a JSON object")
    return value


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file. Raises CheckpointError if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; it is cut off or damaged, get it again") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: those of its index, or all there are."""
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(_is_file_name(name) for name in shards.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map is no map from tensors to files of the folder")
        return [folder / name for name in sorted(set(shards.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is loaded; convert it where you trust "
                "it: safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
            )
        raise CheckpointError(f"{folder} holds no safetensors; pass the folder of a checkpoint")
    return files


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
