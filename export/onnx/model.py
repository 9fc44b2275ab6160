"""From the step graph to a checked ONNX model on disk."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from emssd_compile.errors import OptionError, UnsupportedModelError
from emssd_compile.export.installed import load_library

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

    from emssd_compile.passes.manager import Pass

OPSET = 24  # the first with `nonpad_kv_seqlen`: attention over caches of rows of differing lengths
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
                f"opset_version={self.opset_version!r}: the step needs attention as of opset {OPSET}; pass {OPSET}"
            )


def require_exporter() -> None:
    """Raises ArtifactError unless what writes ONNX is installed."""
    for library in ("onnx", "onnxscript"):
        load_library(library, extra="onnx")


def passes(sizes: object, options: object) -> tuple[Pass, ...]:
    """Values for memory, rectangles for packed queries, a name for each result."""
    from emssd_compile.passes.separate_results import SeparateResults
    from emssd_compile.passes.tile_attention import TileAttention

    return (TileAttention(), SeparateResults())


def environment(details: dict[str, Any], device: torch.device) -> dict[str, str]:
    """Numbers in the model lie as in this machine's memory; all else is ONNX's promise to whoever reads it."""
    return {"byte order": sys.byteorder}


def write_model(graph_module: fx.GraphModule, folder: Path, sizes: object, options: ModelOptions) -> dict[str, Any]:
    """Write `step.onnx`: standard operators alone, every size that may differ symbolic.

    Inputs have the names of the graph's, and each result `r` the name `new_r`, since an ONNX model has one space of
    names. A KV cache and its results, one for each time it is written, are meant to be bound to the same memory.
    Weights above 1.5 GB lie in a file of their own beside the model.

    Args:
        graph_module: the graph after `passes`.
        folder: where to.
        sizes: not needed, since one model takes all.
        options: not needed, since there is one opset only.

    Returns:
        What `open_session` needs: names, shapes and dtypes of the outputs.

    Raises:
        UnsupportedModelError: ONNX cannot express an op; says which, and where it comes from.
    """
    from emssd_compile.export.onnx.translate import TRANSLATIONS

    graph_module = _with_all_writes(graph_module)
    details = _describe(graph_module)
    program = translated(graph_module, list(details["outputs"].values()), TRANSLATIONS)
    with _quiet():
        _fuse(program)
    program.save(folder / FILE, external_data=False)  # all the same outside the file if it is too large for one
    _check(folder / FILE)
    return details


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


def _describe(graph_module: fx.GraphModule) -> dict[str, Any]:
    from emssd_compile.passes.graph import inputs, output

    results: Any = output(graph_module.graph).args[0]
    in_place = {name: cache for name, node in results.items() if (cache := _updates(node))}
    lengths: dict[str, list[object]] = {}  # which input's dimension each symbolic size is
    for node in inputs(graph_module.graph):
        for dim, size in enumerate(node.meta["val"].shape):
            lengths.setdefault(str(size), [str(node.target), dim])
    return {
        "opset": OPSET,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript")},
        "outputs": {name: f"new_{name}" for name in results},
        "in_place": in_place,
        "results": {
            name: {
                "dtype": str(node.meta["val"].dtype).removeprefix("torch."),
                "shape": [s if isinstance(s, int) else lengths[str(s)] for s in node.meta["val"].shape],
            }
            for name, node in results.items()
            if name not in in_place
        },
    }


def _updates(node: fx.Node) -> str | None:
    """The KV cache whose new value `node` is."""
    from emssd_compile.ops import update_kv

    is_update = False
    while node.target == update_kv:
        node, is_update = node.args[0], True  # type: ignore[assignment]
    return str(node.target) if is_update else None


def translated(graph_module: fx.GraphModule, names: Sequence[str], table: Mapping[Any, Any]) -> ONNXProgram:
    """A graph in ONNX operators, constants folded.

    Args:
        graph_module: its inputs keep their names.
        names: of its results.
        table: operators for ops that the exporter does not know.

    Raises:
        UnsupportedModelError: there are no operators for an op; says which, and where it comes from.
    """
    from emssd_compile.export.program import exported_program
    from emssd_compile.passes.graph import inputs

    program = exported_program(graph_module)
    try:
        with _quiet(), torch.no_grad():
            result = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=dict(table),
                input_names=[str(node.target) for node in inputs(graph_module.graph)],
                output_names=names,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _refusal(graph_module, error) from error
    assert result is not None
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to oneself what the exporter says about its own workings: that torchvision is missing, and the like."""
    logs = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "onnx_ir")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _refusal(graph_module: fx.GraphModule, error: BaseException) -> UnsupportedModelError:
    """The error for what the exporter could not translate: the op that it names, and where that stands in the graph."""
    from emssd_compile.passes.graph import refuse

    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    reason = f"ONNX's operators do not express it: {str(causes[-1]).splitlines()[0]}"
    named = re.search(r"target=torch\.ops\.(\S+)\]", "\n".join(map(str, causes)))
    node = _find(graph_module.graph, named.group(1)) if named else None
    return UnsupportedModelError(reason) if node is None else refuse(node, reason)


def _find(graph: fx.Graph, op: str) -> fx.Node | None:
    """The first node that is the op, or is made of it: the exporter takes ops apart that it does not know."""
    calls = [node for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    whole = (node for node in calls if str(node.target) == op)
    return next(whole, None) or next(
        (node for node in calls if node.op == "call_function" and op in _parts(node)), None
    )


def _parts(node: fx.Node) -> set[str]:
    """The ops that `node` is taken apart into."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(*values: Any) -> Any:
        given = dict(zip(node.all_input_nodes, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    table: Any = torch._decomp.decomposition_table
    values = [n.meta["val"] for n in node.all_input_nodes]
    with node.meta["val"].fake_mode:
        traced = make_fx(run, decomposition_table=table)(*values)
    return {str(part.target) for part in traced.graph.nodes}


def _fuse(program: ONNXProgram) -> None:
    """Normalisations and rotary embeddings as the one operator that each has in ONNX; nothing twice, nothing unused."""
    from onnx_ir.passes import common

    # The rules are public by name only through `onnx_fusions.fuse`, which wants opset 23 and nothing newer.
    from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
    from onnxscript.rewriter.rules.fusion._rotary_embedding import fuse_rotary_embedding

    fuse_rms_normalization(program.model)
    fuse_rotary_embedding(program.model)
    common.DeduplicateInitializersPass(size_limit=1 << 13)(program.model)  # small weights were transposed at each use
    common.CommonSubexpressionEliminationPass()(program.model)  # sines and cosines, for each rotary embedding
    common.RemoveUnusedNodesPass()(program.model)
    common.ClearMetadataAndDocStringPass()(program.model)  # which source files each node came from


def _check(path: Path) -> None:
    """The model is valid, its shapes can be inferred, and it needs no operators but the standard's."""
    import onnx

    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    foreign = {node.domain for node in model.graph.node} - {""} | {function.name for function in model.functions}
    if foreign:
        raise UnsupportedModelError(f"the model needs more than ONNX's standard operators: {sorted(foreign)}")
