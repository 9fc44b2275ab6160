"""torch's exporter to ONNX, as the targets use it that go through ONNX: quiet, and with refusals that say where."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.export.installed import load_library

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSET = 24


def require_exporter(extra: str) -> None:
    """Raises ArtifactError unless what the exporter needs is installed; `extra` of this package brings it."""
    for library in ("onnx", "onnxscript"):
        load_library(library, extra=extra)


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
        with quiet(), torch.no_grad():
            result = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=dict(table),
                input_names=[str(node.target) for node in inputs(graph_module.graph)],
                output_names=names,
                verbose=False,
                optimize=False,
            )
            assert result is not None
            _optimize(result)
    except torch.onnx.errors.OnnxExporterError as error:
        raise _refusal(graph_module, error) from error
    return result


def _optimize(program: ONNXProgram) -> None:
    """Do what `torch.onnx.export(optimize=True)` does, but for a rule that looks through the whole graph at each node.

    It makes one `Split` of two `Slice`s, and takes half of the time in which a step of 6,000 nodes is exported. Where a
    version of onnxscript keeps its rules elsewhere, all of them are applied.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter

    try:
        from onnxscript.rewriter.rules.common import slice_split_rule

        rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule]
    except (ImportError, AttributeError):
        program.optimize()
        return
    model = program.model
    optimizer.inline(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, rules)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to oneself what torch's exporter says about its own workings: that torchvision is missing, and the like."""
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
