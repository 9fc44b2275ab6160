"""Names that readers of an ONNX model know: sizes are called as in the docs, nodes after the modules they came from."""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

SIZES = {
    **dict.fromkeys(("token_range", "input_ids"), "T"),
    **dict.fromkeys(("logit_range", "logit_index"), "R"),
    "row_range": "S",
    "draft_range": "P",
}
"""What docs/export.md calls the length of an input; that of any other has the input's own name."""

STEP = "step"
"""Where nodes are that no module of the model has: what packs tokens, accepts drafts and makes the next ones."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"  # torch's, for nodes without a module


def name_sizes(graph: ir.Graph) -> None:
    """Give each size that may differ the name of the input that has it, in all shapes."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for size in value.shape or ():
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(size.value, SIZES.get(str(value.name), str(value.name)))
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def name_nodes(graph: ir.Graph) -> None:
    """Call each node after its module and its operator, `model.layers.0.mlp.up_proj/MatMul`, the next one `..._1`.

    What passes have put between nodes of modules is of the innermost module that has both.
    """
    nodes = [*ir.traversal.RecursiveGraphIterator(graph)]
    own = {node: _module(node) for node in nodes}
    before, behind = dict(own), dict(own)  # the nearest modules on the way from the inputs, and to the outputs
    for node in nodes:
        before[node] = before[node] or next(filter(None, (before.get(each, "") for each in node.predecessors())), "")
    for node in reversed(nodes):
        behind[node] = behind[node] or next(filter(None, (behind.get(each, "") for each in node.successors())), "")
    counts: Counter[str] = Counter()
    for node in nodes:
        name = f"{own[node] or _common(before[node], behind[node]) or STEP}/{node.op_type}"
        node.name = f"{name}_{counts[name]}" if counts[name] else name
        counts[name] += 1


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def _named(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size.value)


def _module(node: ir.Node) -> str:
    """The path of the innermost module of the model, if any; the exporter notes all of them, and the node last."""
    *paths, _ = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
    return paths[-1].removeprefix("model.") if paths and paths[-1] != _NOWHERE else ""


def _common(path: str, other: str) -> str:
    pairs = zip(path.split("."), other.split("."), strict=False)
    return ".".join(part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
