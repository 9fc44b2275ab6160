"""A target that costs nothing: its file is a label, and what it opens runs the graph that it was given."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import emssd_compile.export as targets
from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.export import Target, schema
from emssd_compile.export.folder import Files
from emssd_compile.export.target import option
from emssd_compile.lowering import StepFunction
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.step.signature import Signature
from tests.exactness.models import prompt

PROMPTS = [prompt(n) for n in (5, 17, 2, 30)]
ENVIRONMENT = {"weather": "fine"}
_graphs: list[tuple[fx.GraphModule, str]] = []


@dataclass(frozen=True)
class ToyOptions:
    label: str = option("--label", "toy", metavar="TEXT", help="what it is called")

    def __post_init__(self) -> None:
        if not self.label:
            raise OptionError("label is empty")


def require(options: ToyOptions, device: torch.device, runs: bool) -> None:
    """What a test replaces."""


def distort(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a test replaces."""
    return results


def write(
    graph_module: fx.GraphModule, folder: Path, sizes: object, options: ToyOptions, signature: Signature
) -> dict[str, Any]:
    _graphs.append((graph_module, schema.text(signature)))
    (folder / "inner").mkdir()
    (folder / "inner" / "step.txt").write_text(f"{options.label} {len(_graphs) - 1}")
    (folder / "empty").write_bytes(b"")
    return {"graph": len(_graphs) - 1}


def open_(files: Files, details: dict[str, Any], signature: Signature, device: torch.device) -> StepFunction:
    label, index = files.read("inner/step.txt").decode().split()
    graph_module, said = _graphs[int(index)]
    if details["graph"] != int(index) or schema.text(signature) != said:
        raise ArtifactError(f"{label} has other bindings than its manifest says")
    assert [binding.name for binding in signature.inputs] == [
        n.target for n in graph_module.graph.nodes if n.op == "placeholder"
    ]

    def step(*inputs: Tensor) -> dict[str, Tensor]:
        return distort(graph_module(*inputs))

    return step


def environment(details: dict[str, Any], device: torch.device) -> dict[str, str]:
    return dict(ENVIRONMENT)


def export(fast: OptimizedModel, folder: Path, *, verify_only: bool = False, **options: Any) -> Path:
    """An artifact of it; returns its folder."""
    fast._export("toy", folder, verify_only, True, False, **options)
    return folder


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it one of the targets."""
    target = Target(
        name="toy",
        passes=lambda sizes, options: (),
        write=write,
        open=open_,
        environment=environment,
        require=lambda *asked: require(*asked),
        details={"graph": int},
        options=ToyOptions,
        devices=("cpu",),
    )
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, "toy"))
    monkeypatch.setitem(sys.modules, "emssd_compile.export.toy", SimpleNamespace(TARGET=target))
