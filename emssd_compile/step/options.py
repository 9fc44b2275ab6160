"""Values that each request may set for the parts of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emssd_compile.errors import OptionError


@dataclass(frozen=True)
class RowOption:
    """A number that each request may set; a part that declares one finds it as a tensor `[B]` in its context.

    Parts that declare an option of the same name mean the same one.

    Attributes:
        default: of requests that do not set it. A logits processor whose options all have their defaults does nothing.
        dtype: int64, float32 or bool.
        least, most: range of the values, ends included; None for no bound.
    """

    default: float
    dtype: torch.dtype = torch.int64
    least: float | None = None
    most: float | None = None

    def check(self, name: str, value: object) -> float:
        """The value, if it may be set. Raises OptionError saying what is wrong with it."""
        kinds = {torch.bool: (bool,), torch.int64: (int,), torch.float32: (int, float)}[self.dtype]
        what = {torch.bool: "True or False", torch.int64: "an integer", torch.float32: "a number"}[self.dtype]
        if type(value) not in kinds:
            raise OptionError(f"{name}={value!r} must be {what}")
        assert isinstance(value, (bool, int, float))
        below = self.least is not None and not value >= self.least
        if below or (self.most is not None and not value <= self.most):
            bounds = (f"at least {self.least}", f"at most {self.most}")
            said = " and ".join(b for b, end in zip(bounds, (self.least, self.most), strict=True) if end is not None)
            raise OptionError(f"{name}={value!r} must be {said}")
        return value
