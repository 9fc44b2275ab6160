"""What an artifact is made of, for those who load it: `manifest.json`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, get_args, get_origin, get_type_hints

import torch

from emssd_compile.errors import ArtifactError
from emssd_compile.export.schema import entry, flaws, from_entry, is_entry
from emssd_compile.layouts import LAYOUTS
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.step.acceptance import GUARANTEES
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.signature import Signature
from emssd_compile.step.state import COUNTERS

FORMAT = 4
NAME = "manifest.json"

_MOST = 1 << 31  # tokens of a step
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


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
        processors: names of the classes of the logits processors that the step applies; what they do is an option of
            each request.
        probes: names of the classes of the probes that it asks.
        guarantee: what the acceptance rule promises of the tokens; empty for `"verify"`.
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
    processors: list[str]
    probes: list[str]
    guarantee: str
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
        return Signature(*(tuple(map(from_entry, entries)) for entries in (self.inputs, self.results)))

    def with_signature(self, signature: Signature) -> Manifest:
        """The same with these bindings."""
        return replace(self, inputs=[entry(b) for b in signature.inputs], results=[entry(b) for b in signature.results])

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
            return cls._from_bytes(data, where)
        except RecursionError as error:
            raise ArtifactError(
                f"{where} is no manifest of an artifact: it is nested too deep; export again"
            ) from error

    @classmethod
    def _from_bytes(cls, data: bytes, where: str) -> Manifest:
        try:
            content = json.loads(data)
            version = content["format"]
        except (ValueError, KeyError, TypeError) as error:
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
        wrong = [name for name, kind in kinds.items() if not fits(content[name], kind)]
        manifest = cls(**content)
        wrong = wrong or _unreadable(manifest)
        if wrong:
            raise ArtifactError(
                f"{where} is no manifest of an artifact: {', '.join(wrong)} cannot be read; export again"
            )
        found_flaws = flaws(manifest.signature, manifest.kind)
        if found_flaws:
            raise ArtifactError(f"{where} describes nothing that can be driven: {'; '.join(found_flaws)}; export again")
        return manifest


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=True).encode() + b"\n"


def fits(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of a type. A hash says nothing of who wrote it.

    Args:
        value: from JSON.
        kind: a type such as `dict[str, list[int]]`, or the types of some entries of a dict by name.
    """
    if kind is Any:
        return True
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(name), of) for name, of in kind.items())
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return type(value) is (get_origin(kind) or kind) and all(fits(item, get_args(kind)[-1]) for item in items)


def _is_text(value: object) -> bool:
    """Whether all text in a value can be shown: no control characters, no halves of characters."""
    if isinstance(value, dict):
        return all(_is_text(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(map(_is_text, value))
    return not isinstance(value, str) or not _UNSHOWABLE.search(value)


def _unreadable(manifest: Manifest) -> list[str]:
    """Entries that are of the right types and mean nothing."""
    dtype = getattr(torch, manifest.dtype, None)
    makes_sense = {
        "kind": manifest.kind in ("step", "verify"),
        "device": manifest.device in ("cpu", "cuda"),
        "dtype": isinstance(dtype, torch.dtype) and dtype.is_floating_point,
        "layout": manifest.layout in (LAYOUTS if manifest.kind == "step" else ("",)),
        "guarantee": manifest.guarantee in (GUARANTEES if manifest.kind == "step" else ("",)),
        "chunk": 0 < manifest.chunk < _MOST,
        "buckets": all(len(b) == len(StepSizes._fields) and all(0 < n < _MOST for n in b) for b in manifest.buckets),
        "inputs": all(map(is_entry, manifest.inputs)),
        "results": all(map(is_entry, manifest.results)),
        "files": all(
            _is_inside(name) and {key: type(value) for key, value in file.items()} == {"bytes": int, "sha256": str}
            for name, file in manifest.files.items()
        ),
    }
    wrong = [name for name, is_so in makes_sense.items() if not is_so]
    shown = {name: value for name, value in asdict(manifest).items() if name != "generation_config"}
    return wrong or [name for name, value in shown.items() if not _is_text(value)]


def _is_inside(name: str) -> bool:
    """Whether a file of this name lies in the artifact's folder; each file has one name."""
    path = PurePosixPath(name)
    return name not in ("", ".") and name == str(path) and not path.is_absolute() and ".." not in path.parts
