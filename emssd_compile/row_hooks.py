"""Python that changes logits, for each row by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from emssd_compile.runtime.requests import Request
from emssd_compile.step.logits import LogitContext

if TYPE_CHECKING:
    from emssd_compile.lowering.halves import LogitsHook


class RowHooks:
    """A logits hook that calls those of each request, which see its row alone. What one raises is that request's.

    Args:
        requests: gives the request of each row now.
        hooks: those of a request.
        failed: is told what a hook of a request raised; the logits of its row are left as they were.
    """

    def __init__(
        self,
        requests: Callable[[], Sequence[Request | None]],
        hooks: Callable[[Request], Sequence[LogitsHook]],
        failed: Callable[[Request, BaseException], None],
    ) -> None:
        self._requests, self._hooks, self._failed = requests, hooks, failed

    def __call__(self, context: LogitContext) -> Tensor:
        """The logits `[R, V]`, changed in place."""
        for row, request in enumerate(self._requests()):
            if request is not None and not request.finished and (hooks := self._hooks(request)):
                self._call(context, row, request, hooks)
        return context.logits

    def _call(self, context: LogitContext, row: int, request: Request, hooks: Sequence[LogitsHook]) -> None:
        from emssd_compile.lowering.halves import call_hook  # brings sympy: not needed to import us

        is_own = (context.row_ids == row) & (context.positions > 0)  # [R]; 0: behind the last row
        places = is_own.nonzero().squeeze(1)  # [n]
        if len(places) == 0:
            return
        own = context.of_row(row, places)
        try:
            for hook in hooks:
                own = replace(own, logits=call_hook(hook, own))
        except BaseException as error:
            self._failed(request, error)
        else:
            context.logits[places] = own.logits
