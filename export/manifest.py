"""What an artifact is made of, for those who load it: `manifest.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from emssd_compile.errors import ArtifactError
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.signature import Binding, Signature
from emssd_compile.step.state import COUNTERS

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Everything that loading an artifact needs to know, and what must agree before it is used.

    Attributes:
        target: name of the target.
        kind: `"step"`: the whole decoding step. `"verify"`: the model on packed rows, for a loop of one's own.
        emssd_compile: version of this package that wrote it.
        device: type of device that it was made for.
        dtype: element type of the weights.
        environment: what must be the same where it is loaded (`Target.environment`).
        layout: how much room a step gives to drafts; empty for `"verify"`.
        drafter, acceptance: names of their classes; empty for `"verify"`.
        chunk: most packed tokens of a step.
        buckets: `Sizes` of the steps that are run as one launch where the device can capture them, ascending.
        generation_config: defaults of the options of `generate`.
        explanation: what `explain()` shows.
        details: what the target keeps.
        inputs, results: the bindings, as in `Signature`.
        files: bytes and SHA-256 of every other file of the artifact, by name.
        format: of this record.
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
    chunk: int
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
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{where} is no manifest of an artifact: {error}; export again") from error
        if version != FORMAT:
            raise ArtifactError(f"{where} has format {version}, this package reads {FORMAT}; export again")
        claimed = content.pop("sha256", None)
        # Bytes that do not matter to JSON count, too: an artifact is what was written, or it is not used.
        if hashlib.sha256(_dump(content)).hexdigest() != claimed or _dump({**content, "sha256": claimed}) != data:
            raise ArtifactError(f"{where} is not what was written: its hash differs; export again")
        expected, found = {f.name for f in fields(cls)}, set(content)
        if expected != found:
            differing = ", ".join(sorted(expected ^ found))
            raise ArtifactError(f"{where} was written by another version of this package (it differs in: {differing})")
        return cls(**content)


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=True).encode() + b"\n"


def _entry(binding: Binding) -> dict[str, Any]:
    return {
        "name": binding.name,
        "shape": list(binding.shape),
        "dtype": str(binding.dtype).removeprefix("torch."),
        "role": binding.role,
    }


def _binding(entry: dict[str, Any]) -> Binding:
    return Binding(entry["name"], tuple(entry["shape"]), getattr(torch, entry["dtype"]), entry["role"])
