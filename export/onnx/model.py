"""From the step graph to a checked ONNX model on disk."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from emssd_compile.errors import OptionError, UnsupportedModelError
from emssd_compile.export.onnx.exporter import OPSET, quiet, translated
from emssd_compile.export.schema import KEY, text
from emssd_compile.step.signature import Signature

if TYPE_CHECKING:
    from emssd_compile.passes.manager import Pass

FILE = "step.onnx"


@dataclass(frozen=True)
class ModelOptions:
    """Options of the ONNX target.

    Attributes:
        opset_version: of ONNX; there is a form for one only.

    Raises:
        OptionError: there is no form for this opset.
    """

    opset_version: int = OPSET

    def __post_init__(self) -> None:
        if self.opset_version != OPSET:
            raise OptionError(
                f"opset_version={self.opset_version!r}: the step is written in opset {OPSET}; pass {OPSET}"
            )


def passes(sizes: object, options: object) -> tuple[Pass, ...]:
    """Few wide products, values for memory, rectangles for packed queries, a name for each result."""
    from emssd_compile.passes.fuse_projections import FuseProjections
    from emssd_compile.passes.separate_results import SeparateResults
    from emssd_compile.passes.tile_attention import TileAttention

    return (FuseProjections(), TileAttention(), SeparateResults())


def environment(details: dict[str, Any], device: torch.device) -> dict[str, str]:
    """Numbers in the model lie as in this machine's memory; all else is ONNX's promise to whoever reads it."""
    return {"byte order": sys.byteorder}


def write_model(
    graph_module: fx.GraphModule, folder: Path, sizes: object, options: ModelOptions, signature: Signature
) -> dict[str, Any]:
    """Write `step.onnx`: standard operators alone, every size that may differ symbolic.

    Inputs have the names of the graph's, and each result `r` the name `new_r`, since an ONNX model has one space of
    names. A KV cache and its results, one for each time it is written, are meant to be bound to the same memory.
    Weights above 1.5 GB lie in a file of their own beside the model. Its metadata hold the signature.

    Args:
        graph_module: the graph after `passes`.
        folder: where to.
        sizes: not needed, since one model takes all.
        options: not needed, since there is one opset only.
        signature: of the graph.

    Returns:
        What `open_session` needs: `in_place`, the KV cache that each result is the new value of.

    Raises:
        UnsupportedModelError: ONNX cannot express an op; says which, and where it comes from.
    """
    from emssd_compile.export.onnx.simplify import simplify
    from emssd_compile.export.onnx.translate import TRANSLATIONS

    graph_module = _with_all_writes(graph_module)
    results = _results(graph_module)
    program = translated(graph_module, [f"new_{name}" for name in results], TRANSLATIONS)
    with quiet():
        simplify(program.model)
    program.model.metadata_props[KEY] = text(signature)
    program.save(folder / FILE, external_data=False)  # all the same outside the file if it is too large for one
    _check(folder / FILE)
    return {
        "opset": OPSET,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript")},
        "in_place": {name: cache for name, node in results.items() if (cache := _updates(node))},
    }


def _with_all_writes(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that returns a KV cache each time it is written.

    A draft model writes its caches once for each token that it drafts. What is a result is bound to memory, and so each
    of these writes can be in the cache's own; what lies between two others would be a copy of it. The order is right by
    what the values depend on: a token is drafted from what was read before.
    """
    graph = fx.Graph()
    results: dict[str, Any] = dict(graph.graph_copy(graph_module.graph, {}))  # type: ignore[arg-type]  # by name
    named = {*results.values()}
    for index, node in enumerate(node for node in graph.nodes if _updates(node) and node not in named):
        results[f"{_updates(node)}_write_{index}"] = node
    graph.output(results)
    return fx.GraphModule(graph_module, graph, class_name=graph_module._get_name())


def _results(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """The results of a graph by name. Raises UnsupportedModelError if the memory of one could not be bound."""
    from emssd_compile.passes.graph import inputs, output, refuse

    known = {str(size) for node in inputs(graph_module.graph) for size in node.meta["val"].shape}
    results: Any = output(graph_module.graph).args[0]
    for node in results.values():
        for size in node.meta["val"].shape:
            if not isinstance(size, int) and str(size) not in known:
                raise refuse(node, f"a result's size is {size}, which is not that of any input")
    return dict(results)


def _updates(node: fx.Node) -> str | None:
    """The KV cache whose new value `node` is."""
    from emssd_compile.ops import update_kv

    is_update = False
    while node.target == update_kv:
        node, is_update = node.args[0], True  # type: ignore[assignment]
    return str(node.target) if is_update else None


def _check(path: Path) -> None:
    """The model is valid, its shapes can be inferred, and it needs no operators but the standard's."""
    import onnx

    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    foreign = {node.domain for node in model.graph.node} - {""} | {function.name for function in model.functions}
    if foreign:
        raise UnsupportedModelError(f"the model needs more than ONNX's standard operators: {sorted(foreign)}")
