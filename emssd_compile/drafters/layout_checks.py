"""What layouts of checkpoints have in common when they refuse one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from emssd_compile.checkpoints import Checkpoint
from emssd_compile.errors import CheckpointError, OptionError

C = TypeVar("C")


def refused(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    """The error that says what does not go with a checkpoint, and which one it is."""
    return CheckpointError(f"{checkpoint.folder}: {reason}")


def configured(checkpoint: Checkpoint, make: Callable[..., C], **sizes: Any) -> C:
    """The configuration of those sizes. Raises CheckpointError if one of them is out of range."""
    try:
        return make(**sizes)
    except OptionError as error:
        raise refused(checkpoint, str(error)) from error


def matrix_size(checkpoint: Checkpoint, weight: Tensor) -> tuple[int, int]:
    """Rows and columns. Raises CheckpointError if it is no matrix."""
    if weight.dim() != 2:
        raise refused(checkpoint, f"a weight is {list(weight.shape)}; expected a matrix")
    return weight.shape[0], weight.shape[1]
