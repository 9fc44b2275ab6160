"""What the parts of a step do on the host: they learn of requests that have ended, and say what the step is to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from emssd_compile.errors import PartError
from emssd_compile.runtime.launch import Launcher
from emssd_compile.runtime.requests import Request
from emssd_compile.step.parts import Part


class HostParts:
    """The parts of the step that a launcher runs; an artifact has none, and its step knows zeros.

    Args:
        launcher: owns the tensors that the step reads.
        parts: by what the names of their inputs begin with.
    """

    def __init__(self, launcher: Launcher, parts: Mapping[str, Part]) -> None:
        self._launcher = launcher
        self._parts = dict(parts)

    def tell(self, requests: Sequence[Request]) -> None:
        """These requests have ended; steps to come read what the parts know now."""
        for request in requests:
            text = torch.cat([request.prompt, torch.tensor(request.output, dtype=torch.int64)])
            for part in self._parts.values():
                part.ended(text, len(request.prompt), request.options)
        self.give()

    def give(self) -> None:
        """Let the step read what the parts know now.

        Raises:
            PartError: a part gives something else than it has declared.
        """
        for kind, part in self._parts.items():
            for own, value in part.host_tensors().items():
                held = self._launcher.tensors.get(f"{kind}_{own}")
                if held is None:
                    continue  # no form of the step that has the part has run yet
                if (value.shape, value.dtype) != (held.shape, held.dtype):
                    raise PartError(
                        f"{type(part).__name__}.host_tensors gives {own!r} as {value.dtype} {list(value.shape)}; it is "
                        f"declared as {held.dtype} {list(held.shape)}"
                    )
                self._launcher.assign(f"{kind}_{own}", self._launcher.upload(value))
