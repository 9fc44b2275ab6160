"""What a target writes and opens, without the rest of an artifact."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from emssd_compile.export.folder import Files, fingerprints
from emssd_compile.passes.graph import inputs
from emssd_compile.step.signature import Signature


def signature_of(graph_module: fx.GraphModule) -> Signature:
    """Bindings of a graph that is no step: caches by their names."""
    names = [str(node.target) for node in inputs(graph_module.graph)]
    return Signature.of(graph_module.graph, {name: "cache" if "cache" in name else "input" for name in names})


def files_of(folder: Path) -> Files:
    """The files of a folder, as they are now."""
    return Files(folder, fingerprints(folder))
