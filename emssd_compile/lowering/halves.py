"""A step in two halves, with code of the user's own between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from emssd_compile.errors import ProcessorError
from emssd_compile.lowering import StepFunction
from emssd_compile.passes.split_halves import SEAM
from emssd_compile.step.fields import mapped, with_named
from emssd_compile.step.logits import LogitContext

LogitsHook = Callable[[LogitContext], Tensor]
"""Python that changes logits: takes them with the text before each, gives new ones of the same shape and dtype."""


class HalvedStep:
    """Calls one half, the hooks in their order, and then the other.

    Args:
        names: inputs of the whole step, in the order in which it is called.
        forward, decide: the halves, and the names of their inputs in order.
        form: a `LogitContext` with the fields that there are.
    """

    def __init__(
        self,
        names: Sequence[str],
        forward: tuple[StepFunction, Sequence[str]],
        decide: tuple[StepFunction, Sequence[str]],
        form: LogitContext,
    ) -> None:
        self.hooks: tuple[LogitsHook, ...] = ()
        self._names, self._forward, self._decide, self._form = tuple(names), forward, decide, form

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Results by name.

        Raises:
            ProcessorError: a hook returned something else than logits like those that it was given.
        """
        given = dict(zip(self._names, inputs, strict=True))
        forward, names = self._forward
        read = forward(*(given[name] for name in names))
        context = with_named(self._form, {n.removeprefix(SEAM): v for n, v in read.items() if n.startswith(SEAM)})
        for hook in self.hooks:
            context = replace(context, logits=call_hook(hook, context))
        read[f"{SEAM}logits"] = context.logits.contiguous()  # as compiled code reads it
        decide, names = self._decide
        return decide(*(read[name] if name in read else given[name] for name in names))


def call_hook(hook: LogitsHook, context: LogitContext) -> Tensor:
    """What a hook makes of the logits, on their device.

    Raises:
        ProcessorError: it returned something else than logits like those that it was given.
    """
    before, logits = context.logits, hook(mapped(torch.clone, context))
    if not isinstance(logits, Tensor) or (logits.shape, logits.dtype) != (before.shape, before.dtype):
        found = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ProcessorError(
            f"the logits hook returned {found}; it is to return logits as it got them: {before.dtype} "
            f"{list(before.shape)}"
        )
    return logits.to(before.device)
