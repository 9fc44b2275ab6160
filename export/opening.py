"""From an artifact to something that runs, after everything was compared that has to agree."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import emssd_compile.export as targets
from emssd_compile.errors import ArtifactError, InvalidInputError, OptionError
from emssd_compile.export.folder import Files, read_manifest
from emssd_compile.export.manifest import Manifest, fits
from emssd_compile.export.target import Target
from emssd_compile.lowering import StepFunction
from emssd_compile.runtime.memory import check_room
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.signature import ROLES, Binding
from emssd_compile.step.state import COUNTERS


def open_artifact(
    folder: str | Path, device: str | torch.device | None = None, *, target: str | None = None, kind: str | None = None
) -> tuple[Manifest, torch.device, StepFunction]:
    """Check an artifact against its manifest and this machine, and open it.

    Args:
        folder: the artifact.
        device: where it is to run; default: the kind of device that it was made for.
        target: what it must be for; default: anything.
        kind: what it must be, `"step"` or `"verify"`; default: either.

    Raises:
        ArtifactError: it is damaged, or was made for something else than what is here; says what differs. Nothing of
            it was run.
        OptionError: there is no such target or device, or it does not run on one.
        CapacityError: its KV caches do not fit into memory.
    """
    if target is not None:
        targets.find_target(target)
    if not isinstance(folder, (str, Path)):
        raise OptionError(f"folder={folder!r} is a {type(folder).__name__}; pass the path of an artifact")
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_kind(folder, manifest, target, kind)
    where = _device(manifest.device if device is None else device)
    made_for = targets.find_target(manifest.target)
    wrong = [name for name, of in made_for.details.items() if not fits(manifest.details.get(name), of)]
    if wrong:
        raise ArtifactError(
            f"{folder} is no artifact of {made_for.name}: {', '.join(wrong)} in its details cannot be read"
        )
    _compare_surroundings(folder, manifest, made_for, where)
    check_room({b.name: b.spec for b in manifest.signature.inputs if b.role not in ("size", "input")}, where)
    with Files(folder, manifest.files) as files:
        return manifest, where, made_for.open(files, manifest.details, manifest.signature, where)


def check_kind(folder: Path, manifest: Manifest, target: str | None, kind: str | None) -> None:
    """Raises ArtifactError if an artifact is for no target that is known, or is not what the caller expects."""
    if manifest.target not in targets.TARGETS:
        raise ArtifactError(f"{folder} is for {manifest.target!r}, which is none of {list(targets.TARGETS)}")
    if target not in (None, manifest.target):
        raise ArtifactError(f"{folder} is for {manifest.target}, not for {target}; nothing of it was opened")
    if kind == "step" != manifest.kind:
        raise ArtifactError(
            f"{folder} holds a verify-only graph, which does not decode by itself; open it with "
            "emssd_compile.export.open_graph"
        )


def _compare_surroundings(folder: Path, manifest: Manifest, target: Target, where: torch.device) -> None:
    """Raises unless what an artifact needs is what is here."""
    if where.type not in target.devices:
        known = " or ".join(target.devices)
        raise OptionError(f"{folder} is for {target.name}, which runs on {known}, not on {where.type}")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ArtifactError(
            f"{folder} is to run on {where}, and torch finds {torch.cuda.device_count()} CUDA devices here"
        )
    _compare(folder, "meaning of the report", manifest.report_fields, list(REPORT_FIELDS))
    _compare(folder, "meaning of the counters", manifest.counters, list(COUNTERS))
    here = target.environment(manifest.details, where)
    for name in sorted({*manifest.environment, *here}, key=str.lower):
        _compare(folder, name, manifest.environment.get(name), here.get(name))


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={device!r} is none that torch knows: {str(error).splitlines()[0]}") from error


def _compare(folder: Path, what: str, made_for: object, here: object) -> None:
    if made_for != here:
        raise ArtifactError(f"{folder} was made for {what} {made_for}, here it is {here}; export again on this machine")


class LoadedGraph:
    """An artifact as a function of tensors, for a loop of one's own; threads may call it at once.

    Attributes:
        manifest: what is known of it.
        device: where it runs.
    """

    def __init__(self, manifest: Manifest, device: torch.device, step: StepFunction) -> None:
        self.manifest = manifest
        self.device = torch.empty(0, device=device).device  # "cuda" is one of them, which has an index
        self._inputs = manifest.signature.inputs
        self._step = step

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Results by name, for all inputs by name; KV caches are written in place.

        Raises:
            InvalidInputError: an input is missing, unknown, or of another shape, dtype or device than it must be.
        """
        expected = {binding.name for binding in self._inputs}
        if tensors.keys() != expected:
            differing = ", ".join(sorted(tensors.keys() ^ expected))
            raise InvalidInputError(f"the inputs are {sorted(expected)}; missing or unknown: {differing}")
        sizes: dict[str, int] = {}
        for binding in self._inputs:
            self._check(binding, tensors[binding.name], sizes)
        return self._step(*(tensors[binding.name] for binding in self._inputs))

    def empty(self, role: str) -> dict[str, Tensor]:
        """Zeros for every input of a role (`"cache"`, `"state"`, ...). Raises OptionError for another role."""
        fixed = [name for name in ROLES if name not in ("size", "input", "result")]
        if role not in fixed:
            raise OptionError(f"role={role!r} is none of an input whose shape is fixed; choose one of {fixed}")
        bindings = self.manifest.signature.with_role(role).values()
        return {b.name: torch.zeros(b.spec.shape, dtype=b.dtype, device=self.device) for b in bindings}

    def _check(self, binding: Binding, value: Tensor, sizes: dict[str, int]) -> None:
        shape = list(value.shape)
        fits = len(shape) == len(binding.shape) and all(
            have == (want if isinstance(want, int) else sizes.setdefault(want, have))
            for have, want in zip(shape, binding.shape, strict=True)
        )
        if not fits:
            raise InvalidInputError(f"{binding.name} has shape {shape}, expected {list(binding.shape)} with {sizes}")
        if (value.dtype, value.device) != (binding.dtype, self.device):
            found, wanted = (value.dtype, value.device), (binding.dtype, self.device)
            raise InvalidInputError(f"{binding.name} is {found[0]} on {found[1]}, expected {wanted[0]} on {wanted[1]}")
        if not value.is_contiguous():
            raise InvalidInputError(f"{binding.name} is not contiguous")


def open_graph(
    folder: str | Path, device: str | torch.device | None = None, *, target: str | None = None
) -> LoadedGraph:
    """Open any artifact as a function of tensors. Arguments and errors are those of `emssd_compile.load`."""
    return LoadedGraph(*open_artifact(folder, device, target=target))
