"""Values that each request may set for the parts of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.errors import OptionError
from emssd_compile.numeric import flag, integer, number, shown
from emssd_compile.step.readers import READERS

OPTION_DTYPES = (torch.int64, torch.float32, torch.bool)


@dataclass(frozen=True)
class RowOption:
    """A number or a table that each request may set; a part that declares one finds it as `[B, *shape]` in its context.

    Parts that declare an option of the same name mean the same one.

    Attributes:
        default: of requests that do not set it; of a table, all of its elements. A logits processor whose options all
            have their defaults does nothing.
        dtype: int64, float32 or bool.
        least, most: range of the values, ends included; None for no bound.
        needs: the name of a bool option without which this one has no effect; empty if there is none.
        implied: what a request that sets `needs`, but not this one, is given; None for the default.
        shape: sizes of a table, which lists and dicts are read into; empty for a number.
        reader: which of `readers.READERS` reads what a request sets; empty for a number in the range.
    """

    default: float
    dtype: torch.dtype = torch.int64
    least: float | None = None
    most: float | None = None
    needs: str = ""
    implied: float | None = None
    shape: tuple[int, ...] = ()
    reader: str = ""

    @property
    def is_table(self) -> bool:
        """Whether a list that a request sets is one value, and not one for each row."""
        return bool(self.shape)

    def read(self, name: str, value: object, vocabulary: int) -> float | Tensor:
        """What a request sets: a number, or the line `[*shape]` of a table.

        Args:
            name: of the option.
            value: as the caller gave it.
            vocabulary: V.

        Raises:
            OptionError: it may not be set; says what is wrong with it.
        """
        if not self.reader:
            return self.check(name, value)
        found = READERS[self.reader].read(name, value, self.shape, vocabulary)
        return found.to(self.dtype) if isinstance(found, Tensor) else found

    def is_default(self, value: float | Tensor) -> bool:
        """Whether something that was read asks for nothing."""
        return bool((value == self.default).all()) if isinstance(value, Tensor) else value == self.default

    def lines(self, values: Iterable[float | Tensor]) -> Tensor:
        """`[n, *shape]`: what `n` requests set, the default among it."""
        return torch.stack([torch.as_tensor(value, dtype=self.dtype).expand(self.shape) for value in values])

    def check(self, name: str, value: object) -> float:
        """The number, if it is in the range. Raises OptionError saying what is wrong with it."""
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
