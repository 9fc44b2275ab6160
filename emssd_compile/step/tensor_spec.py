"""What a part asks the runtime to allocate for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that travels from step to step, or that the host gives to steps; zeros at first.

    Attributes:
        shape: sizes.
        dtype: element type.
        kept: `"row"`: the first size is B, and a row's line is zeroed when a request starts in it. `"forever"`: never
            reset. `"host"`: the step reads what `Part.host_tensors` gives, and returns nothing for it.
        in_place: whether it is written where it lies, as KV caches are; such a tensor is kept forever. It is
            `[B, slots, ...]`, and what lies in slot p of a row is made of the row's text up to position p + 1: where a
            row starts behind a prompt that another has read, that one's slots are copied. Any other tensor is read
            only, and its new value is returned.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: Literal["row", "forever", "host"] = "row"
    in_place: bool = False
