"""The folder of a run: its command, its continuations, its newest checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from emssd_compile.checkpoints import CONFIG, read_json
from emssd_compile.errors import CheckpointError, OptionError
from emssd_compile.files import write_whole
from emssd_compile.numeric import shown

_COMMAND, _CHECKPOINT, _CONTINUATIONS = "command.json", "checkpoint.safetensors", "continuations"
_HEAD, _ADAM = "head.", ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        curve: of each step the loss, then the accuracies of each draft position: all top-1, then all top-5.
        held_out: the same for the windows held out, by the number of steps before.
    """

    curve: list[list[float]] = field(default_factory=list)
    held_out: dict[int, list[float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Those of the optimizer that are done."""
        return len(self.curve)

    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors, for a checkpoint."""
        rows = [[float(steps), *row] for steps, row in self.held_out.items()]
        return {name: torch.tensor(of, dtype=torch.float64) for name, of in (("curve", self.curve), ("held_out", rows))}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Progress:
        """The way back."""
        curve: list[list[float]] = tensors["curve"].tolist()
        return cls(curve, {int(row[0]): row[1:] for row in tensors["held_out"].tolist()})


class WorkFolder:
    """`DIR/work`: what a run needs to go on when it is started again. Each file in it is whole at any moment.

    Args:
        out: the folder of the head to be, new, or that of a run with the same command.

    Raises:
        OptionError: the folder holds something else, or cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "work"
        self.continuations = self.folder / _CONTINUATIONS
        begun = (self.folder / _COMMAND).is_file()
        if (out / CONFIG).exists() and not begun:
            raise OptionError(f"--out {out} holds a checkpoint that was not trained there; pass a new folder")
        try:
            self.continuations.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "writable", b"")
            (self.folder / "writable").unlink(missing_ok=True)
        except OSError as error:
            raise OptionError(
                f"--out {out} cannot be written: {error.strerror or error}; pass another folder"
            ) from error

    def begin(self, command: Mapping[str, Any], *, writes: bool = True) -> None:
        """Take up the run of this command: from its beginning, or where it was left.

        Raises:
            OptionError: the folder is that of another command; says what differs.
        """
        file = self.folder / _COMMAND
        given = json.loads(json.dumps(command))
        if file.is_file():
            before = read_json(file)
            differing = sorted(n for n in given.keys() | before.keys() if given.get(n) != before.get(n))
            if differing:
                what = "; ".join(f"{n} was {shown(before.get(n))}, is {shown(given.get(n))}" for n in differing)
                raise OptionError(
                    f"{self.folder.parent} is the folder of a run with another command: {what}. Give the command "
                    "that it was begun with to go on, or pass another --out"
                )
        elif writes:
            write_whole(file, (json.dumps(given, indent=2, sort_keys=True) + "\n").encode())

    def save(self, head: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a checkpoint in the place of the last one."""
        tensors = {f"{_HEAD}{name}": value for name, value in head.state_dict().items()}
        for name, parameter in trained(head):
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
        tensors |= progress.tensors()
        held = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        write_whole(self.folder / _CHECKPOINT, save(held))

    def load(self, head: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Bring head and optimizer to the state of the checkpoint, if there is one.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another head.
        """
        file = self.folder / _CHECKPOINT
        if not file.exists():
            return Progress()
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            head.load_state_dict({n.removeprefix(_HEAD): v for n, v in tensors.items() if n.startswith(_HEAD)})
            state = {
                index: {key: tensors[f"{key}.{name}"] for key in _ADAM if f"{key}.{name}" in tensors}
                for index, (name, _) in enumerate(trained(head))
            }
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            return Progress.of(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file} cannot be used: {error}; remove it to begin anew") from error


def trained(head: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by name."""
    return [(name, parameter) for name, parameter in head.named_parameters() if parameter.requires_grad]
