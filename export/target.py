"""What a target is: a form in which the step leaves Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from emssd_compile.errors import OptionError
from emssd_compile.lowering import StepFunction

if TYPE_CHECKING:
    from emssd_compile.passes.manager import Pass
    from emssd_compile.runtime.buckets import StepSizes


def option(flag: str, default: Any, **argument: Any) -> Any:
    """A field of a target's options that the command line has, too.

    Args:
        flag: as in `"--weights"`; no two targets may have the same, since all are options of one command.
        default: of the field.
        **argument: what `argparse.ArgumentParser.add_argument` takes: `help`, `choices`, `action`, ...
    """
    return field(default=default, metadata={"flag": flag, "argument": argument})


@dataclass(frozen=True)
class NoOptions:
    """The options of a target that has none."""


@dataclass(frozen=True)
class Target:
    """A form in which the step leaves Python. To add one: a folder with these functions, one line in `TARGETS`.

    Attributes:
        name: `"onnx"`, ...
        passes: `passes(sizes, options) -> tuple of passes`, the rewrites that give the step the form that the target
            takes.
        write: `write(graph_module, folder, sizes, options, signature) -> details`: writes the files of the target into
            `folder`; `details` is kept in the manifest, so it must be made of what JSON knows. `graph_module` has named
            inputs and a dict of results; sizes that may differ from call to call are symbolic in `meta["val"]`. `sizes`
            are those of steps that will run most, ascending, and last the largest. `signature` says all of its
            bindings; a format that has room for text should hold `schema.text(signature)`.
        open: `open(files, details, signature, device) -> step`: what runs the files (`folder.Files`). It takes inputs
            in the order of the signature, writes KV caches in place, and returns the signature's results; threads may
            call it at once. The signature and the details are those of a manifest that anyone may have written: what
            does not agree with the graph itself is refused, with ArtifactError.
        environment: `environment(details, device) -> what must be the same where the artifact is loaded`, as text by
            name: versions, instruction sets, the GPU's capability. It is compared when the artifact is opened.
        require: `require(options, device, runs)`, asked before any work: raises ArtifactError if something is missing
            here that building for weights on `device` takes, or, if `runs`, that running it there takes; OptionError
            if what is here cannot do what the options ask.
        details: the types of the entries of `details` that `environment` and `open` read, by name.
        options: a frozen dataclass of the target's options, which checks their values when it is made. Those that are
            fields by `option` can be given on the command line.
        devices: types of device that it runs on.
        is_captured: whether its steps can be captured in CUDA graphs; not if they wait for the device.
    """

    name: str
    passes: Callable[[Sequence[StepSizes], Any], tuple[Pass, ...]]
    write: Callable[..., dict[str, Any]]
    open: Callable[..., StepFunction]
    environment: Callable[[dict[str, Any], torch.device], dict[str, str]]
    require: Callable[[Any, torch.device, bool], None]
    details: Mapping[str, Any] = field(default_factory=dict)
    options: type[Any] = NoOptions
    devices: tuple[str, ...] = ("cpu", "cuda")
    is_captured: bool = True

    @property
    def flags(self) -> dict[str, Field[Any]]:
        """The options that the command line has, too, by their flag (see `option`)."""
        return {each.metadata["flag"]: each for each in fields(self.options) if "flag" in each.metadata}

    def choose(self, given: Mapping[str, Any]) -> Any:
        """The options of these names. Raises OptionError for a name or a value that there is not."""
        known = [each.name for each in fields(self.options)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(f"unknown options {unknown}; {self.name} knows {known or 'none'}")
        return self.options(**given)
