"""What an artifact is made of, for those who load it: `manifest.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import PurePosixPath
from typing import Any, get_args, get_origin, get_type_hints

import torch

from emssd_compile.errors import ArtifactError
from emssd_compile.layouts import LAYOUTS
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.signature import ROLES, Binding, Signature
from emssd_compile.step.state import COUNTERS, StepState

FORMAT = 1
NAME = "manifest.json"

_STATE = {f.name for f in fields(StepState)}


@dataclass(frozen=True)
class Manifest:
    """Everything that loading an artifact needs to know, and what must agree before it is used.

    The version of this package is recorded and not compared: an artifact stays usable as long as its `format` can be
    read, its report means the same, and the target's `environment` agrees. Where code of this package is called by what
    was compiled, the hash of that code is in the environment.

    Attributes:
        target: name of the target.
        kind: `"step"`: the whole decoding step. `"verify"`: the model on packed rows, for a loop of one's own.
        emssd_compile: version of this package that wrote it; for people.
        device: type of device that it was made for.
        dtype: element type of the weights.
        environment: what must be the same where it is loaded (`Target.environment`).
        layout: how much room a step gives to drafts; empty for `"verify"`.
        drafter, acceptance: names of their classes; empty for `"verify"`.
        lossless: whether the acceptance rule keeps the model's own tokens.
        chunk: most packed tokens of a step.
        deterministic: whether the sizes of steps depend on nothing but the requests.
        buckets: `StepSizes` of the steps that are run as one launch where the device can capture them, ascending.
        generation_config: defaults of the options of `generate`.
        explanation: what `explain()` shows.
        details: what the target keeps.
        inputs, results: the bindings, as in `Signature`.
        files: bytes and SHA-256 of every other file of the artifact, by name.
        format: of this record; a change that an older reader would misunderstand takes the next number.
        report_fields, counters: meaning of the step's report and of its counters.
    """

    target: str
    kind: str
    emssd_compile: str
    device: str
    dtype: str
    environment: dict[str, str]
    layout: str
    drafter: str
    acceptance: str
    lossless: bool
    chunk: int
    deterministic: bool
    buckets: list[list[int]]
    generation_config: dict[str, Any]
    explanation: dict[str, Any]
    details: dict[str, Any]
    inputs: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT
    report_fields: list[str] = field(default_factory=lambda: list(REPORT_FIELDS))
    counters: list[str] = field(default_factory=lambda: list(COUNTERS))

    @property
    def signature(self) -> Signature:
        """The bindings."""
        return Signature(*(tuple(_binding(entry) for entry in entries) for entries in (self.inputs, self.results)))

    def with_signature(self, signature: Signature) -> Manifest:
        """The same with these bindings."""
        return replace(
            self, inputs=[_entry(b) for b in signature.inputs], results=[_entry(b) for b in signature.results]
        )

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`; its last entry is a hash of the others."""
        content = asdict(self)
        return _dump({**content, "sha256": hashlib.sha256(_dump(content)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Read the content of `manifest.json`.

        Raises:
            ArtifactError: it was edited or cut, or another format than this package reads.
        """
        try:
            content = json.loads(data)
            version = content["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{where} is no manifest of an artifact: {error}; export again") from error
        if version != FORMAT:
            raise ArtifactError(f"{where} has format {version}, this package reads {FORMAT}; export again")
        claimed = content.pop("sha256", None)
        # Bytes that do not matter to JSON count, too: an artifact is what was written, or it is not used.
        if hashlib.sha256(_dump(content)).hexdigest() != claimed or _dump({**content, "sha256": claimed}) != data:
            raise ArtifactError(f"{where} is not what was written: its hash differs; export again")
        kinds, found = get_type_hints(cls), set(content)
        if kinds.keys() != found:
            differing = ", ".join(sorted(kinds.keys() ^ found))
            raise ArtifactError(f"{where} was written by another version of this package (it differs in: {differing})")
        wrong = [name for name, kind in kinds.items() if not _fits(content[name], kind)]
        manifest = cls(**content)
        wrong = wrong or _unreadable(manifest)
        if wrong:
            raise ArtifactError(
                f"{where} is no manifest of an artifact: {', '.join(wrong)} cannot be read; export again"
            )
        return manifest


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=True).encode() + b"\n"


def _fits(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of a type of `Manifest`'s entries. A hash says nothing of who wrote it."""
    if kind is Any:
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return type(value) is (get_origin(kind) or kind) and all(_fits(item, get_args(kind)[-1]) for item in items)


def _unreadable(manifest: Manifest) -> list[str]:
    """Entries that are of the right types and mean nothing."""
    makes_sense = {
        "kind": manifest.kind in ("step", "verify"),
        "dtype": isinstance(getattr(torch, manifest.dtype, None), torch.dtype),
        "layout": manifest.layout in (LAYOUTS if manifest.kind == "step" else ("",)),
        "chunk": manifest.chunk > 0,
        "buckets": all(len(bucket) == len(StepSizes._fields) for bucket in manifest.buckets),
        "inputs": all(map(_is_binding, manifest.inputs)) and (manifest.kind == "verify" or _names(manifest) >= _STATE),
        "results": all(map(_is_binding, manifest.results)),
        "files": all(
            _is_inside(name) and entry.keys() == {"bytes", "sha256"} for name, entry in manifest.files.items()
        ),
    }
    return [name for name, is_so in makes_sense.items() if not is_so]


def _names(manifest: Manifest) -> set[str]:
    return {entry["name"] for entry in manifest.inputs}


def _is_binding(entry: dict[str, Any]) -> bool:
    return (
        entry.keys() == {"name", "shape", "dtype", "role"}
        and all(isinstance(entry[name], str) for name in ("name", "dtype", "role"))
        and isinstance(getattr(torch, entry["dtype"], None), torch.dtype)
        and entry["role"] in ROLES
        and isinstance(entry["shape"], list)
        and all(isinstance(size, str) or (type(size) is int and size >= 0) for size in entry["shape"])
    )


def _is_inside(name: str) -> bool:
    """Whether a file of this name lies in the artifact's folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _entry(binding: Binding) -> dict[str, Any]:
    return {
        "name": binding.name,
        "shape": list(binding.shape),
        "dtype": str(binding.dtype).removeprefix("torch."),
        "role": binding.role,
    }


def _binding(entry: dict[str, Any]) -> Binding:
    return Binding(entry["name"], tuple(entry["shape"]), getattr(torch, entry["dtype"]), entry["role"])
