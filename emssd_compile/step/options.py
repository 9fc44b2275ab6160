"""Values that each request may set for the parts of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from emssd_compile.errors import OptionError
from emssd_compile.numeric import flag, integer, number, shown

OPTION_DTYPES = (torch.int64, torch.float32, torch.bool)


@dataclass(frozen=True)
class RowOption:
    """A number that each request may set; a part that declares one finds it as a tensor `[B]` in its context.

    Parts that declare an option of the same name mean the same one.

    Attributes:
        default: of requests that do not set it. A logits processor whose options all have their defaults does nothing.
        dtype: int64, float32 or bool.
        least, most: range of the values, ends included; None for no bound.
        needs: the name of a bool option without which this one has no effect; empty if there is none.
        implied: what a request that sets `needs`, but not this one, is given; None for the default.
    """

    default: float
    dtype: torch.dtype = torch.int64
    least: float | None = None
    most: float | None = None
    needs: str = ""
    implied: float | None = None

    def check(self, name: str, value: object) -> float:
        """The value, if it may be set. Raises OptionError saying what is wrong with it."""
        readers: dict[torch.dtype, Callable[[str, object], float]]
        readers = {torch.bool: flag, torch.int64: integer, torch.float32: number}
        found = readers[self.dtype](name, value)
        if self.least is not None and found < self.least:
            raise OptionError(f"{name}={shown(found)} is out of range; pass at least {self.least}")
        if self.most is not None and found > self.most:
            raise OptionError(f"{name}={shown(found)} is out of range; pass at most {self.most}")
        return found


DO_SAMPLE = RowOption(default=False, dtype=torch.bool)
"""`do_sample`: whether a row's tokens are drawn rather than the likeliest; declared by rules that can draw."""
