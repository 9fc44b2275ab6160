"""What a target is: a form in which the step leaves Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from emssd_compile.lowering import Step

if TYPE_CHECKING:
    from emssd_compile.passes.manager import Pass


@dataclass(frozen=True)
class Target:
    """A form in which the step leaves Python. To add one: a folder with these functions, one line in `TARGETS`.

    Attributes:
        name: `"onnx"`, ...
        passes: `passes() -> tuple of passes`, the rewrites that give the step the form that the target takes.
        write: `write(graph_module, folder, sizes, **options) -> details`: writes the files of the target into `folder`;
            `details` is kept in the manifest, so it must be made of what JSON knows. `graph_module` has named inputs
            and a dict of results; sizes that may differ from call to call are symbolic in `meta["val"]`. `sizes` are
            those (`Sizes`) of steps that will run most, ascending, and last the largest.
        open: `open(folder, details, input_names, device) -> step`: what runs the files. It writes KV caches in place,
            and they are not among its results.
        environment: `environment(details, device) -> what must be the same where the artifact is loaded`, as text by
            name: versions, instruction sets, the GPU's capability. It is compared when the artifact is opened.
        devices: types of device that it runs on.
        is_captured: whether its steps can be captured into CUDA graphs; what runs on a stream of its own, or makes the
            host wait, cannot.
    """

    name: str
    passes: Callable[[], tuple[Pass, ...]]
    write: Callable[..., dict[str, Any]]
    open: Callable[..., Step]
    environment: Callable[[dict[str, Any], torch.device], dict[str, str]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    is_captured: bool = True
