"""`inspect`: what an artifact holds, and whether it is whole."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emssd_compile.cli.models import PROGRAM, add_command
from emssd_compile.export.folder import Files, read_manifest
from emssd_compile.export.manifest import Manifest
from emssd_compile.step.signature import Binding

EXAMPLES = f"""
examples:
  {PROGRAM} inspect llama.onnx/
      what it was made from and for, its bindings, its buckets of sizes, and its files
  {PROGRAM} inspect llama.trt/
      for an engine also the shapes that each of its profiles is made for

Every file is compared with its hash; a damaged artifact is an error.
"""

MOST_CHARACTERS = 240  # longer entries are for the target's own runner


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "inspect", "show what an artifact holds", EXAMPLES)
    parser.add_argument("artifact", metavar="DIR", type=Path, help="a folder that export wrote")


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    manifest = read_manifest(arguments.artifact)
    with Files(arguments.artifact, manifest.files):  # each is compared with its hash
        pass
    # Not the terminal's width: its tables keep their columns when the output is a file or a narrow terminal.
    console = Console(file=sys.stdout, width=120)
    for table in describe(manifest):
        console.print(table)


_FACTS = (
    "emssd_compile",
    "format",
    "device",
    "dtype",
    "layout",
    "chunk",
    "deterministic",
    "drafter",
    "acceptance",
    "guarantee",
)
"""Fields of a manifest that are shown as they are."""


def describe(manifest: Manifest) -> list[Table]:
    """Tables of all that a manifest says."""
    bindings = [_bindings(which, manifest) for which in ("inputs", "results")]
    return [_facts(manifest), *bindings, *_sizes(manifest), *_profiles(manifest), _files(manifest)]


def _facts(manifest: Manifest) -> Table:
    table = Table(title=f"{manifest.target}: {manifest.kind}", show_header=False)
    details = {name: value for name, value in manifest.details.items() if name != "profiles"}
    values = {name: getattr(manifest, name) for name in _FACTS} | manifest.environment | details
    for name, value in values.items():
        text = _plain(value)
        if 0 < len(text) <= MOST_CHARACTERS:
            table.add_row(name, text)
    return table


def _bindings(which: str, manifest: Manifest) -> Table:
    table = Table("name", "shape", "dtype", "role", title=which)
    bindings: tuple[Binding, ...] = getattr(manifest.signature, which)
    for binding in bindings:
        shape = ", ".join(str(size) for size in binding.shape)
        table.add_row(binding.name, f"\\[{shape}]", str(binding.dtype).removeprefix("torch."), binding.role)
    return table


def _sizes(manifest: Manifest) -> list[Table]:
    if not manifest.buckets:
        return []
    table = Table("tokens", "logits", "drafter's tokens", "tokens of a row", title="buckets")
    for bucket in manifest.buckets:
        table.add_row(*map(str, bucket))
    return [table]


def _profiles(manifest: Manifest) -> list[Table]:
    """Of an engine: the shapes that each of its profiles is made for."""
    tables = []
    for index, profile in enumerate(manifest.details.get("profiles", [])):
        table = Table("input", "least", "usual", "most", title=f"profile {index}")
        for name, shapes in profile.items():
            table.add_row(name, *(f"\\{shape}" for shape in shapes))
        tables.append(table)
    return tables


def _files(manifest: Manifest) -> Table:
    table = Table("file", "bytes", "sha256", title="files, as they were written")
    for name, entry in manifest.files.items():
        table.add_row(name, f"{entry['bytes']:,}", f"{entry['sha256'][:16]}...")
    return table


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return str(value)
