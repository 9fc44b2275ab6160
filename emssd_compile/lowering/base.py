"""What a backend gives back."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Lowered:
    """A step that runs.

    Attributes:
        run: takes the graph's inputs in order, returns its outputs by name.
        fit: rounds a size of a step (T, R, S) up to one that `run` takes without compiling anew.
    """

    run: Callable[..., dict[str, Tensor]]
    fit: Callable[[int], int]
