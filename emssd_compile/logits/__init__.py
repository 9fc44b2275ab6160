"""Logits processors: what is done to the target's logits before a rule reads them.

To add one: one file with a `LogitsProcessor`, one line in `PROCESSORS`, in the order in which they are applied.
"""

from collections.abc import Callable

from emssd_compile.logits.min_new_tokens import MinNewTokens
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.options import RowOption

PROCESSORS: tuple[Callable[[], LogitsProcessor], ...] = (MinNewTokens,)

__all__ = ["PROCESSORS", "LogitContext", "LogitsProcessor", "MinNewTokens", "Processed", "RowOption"]
