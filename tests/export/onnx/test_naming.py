"""`naming`: sizes have the names of docs/export.md, nodes those of the modules that they came from."""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

from emssd_compile.export.onnx.naming import name_nodes, name_sizes


def _sizes(value):
    return [dim.dim_param for dim in value.type.tensor_type.shape.dim if dim.dim_param]


def test_sizes_are_those_of_the_docs(llama):
    asked = {value.name: _sizes(value) for value in llama.input}
    sizes = {"token_range": ["T"], "logit_range": ["R"], "row_range": ["S"], "draft_range": ["P"]}
    assert {name: found for name, found in asked.items() if found} == {n: s for n, s in sizes.items() if n in asked}
    everywhere = {size for value in llama.value_info for size in _sizes(value)}
    assert {"T", "R"} < everywhere
    assert not [size for size in everywhere if re.search(r"\bs\d+\b|size_\d", size)]


def test_nodes_are_named_after_modules(llama):
    named = [node.name.rpartition("/") for node in llama.node]
    assert max(Counter(node.name for node in llama.node).values()) == 1
    assert all(re.fullmatch(rf"{node.op_type}(_\d+)?", name[2]) for node, name in zip(llama.node, named, strict=True))
    modules = {path: {op for other, _, op in named if other == path} for path, *_ in named}
    assert {"step", "model.embed_tokens", "model.norm", "lm_head"} < modules.keys()
    assert "ArgMax" in modules["step"]
    for layer in ("model.layers.0", "model.layers.1"):
        assert modules[f"{layer}.mlp.down_proj"] == {"MatMul"}
        assert modules[f"{layer}.input_layernorm"] == {"RMSNormalization"}
        assert {"RotaryEmbedding", "ScatterND", "Softmax"} < modules[f"{layer}.self_attn"], "what passes put there, too"


def _node(op, inputs, scopes):
    notes = {} if scopes is None else {"pkg.torch.onnx.name_scopes": repr([*scopes, op.lower()])}
    return ir.node(op, inputs, metadata_props=notes)


def test_what_lies_between_modules_is_of_the_innermost_that_has_both():
    given = ir.val("input_ids", shape=["s3"], type=ir.TensorType(ir.DataType.FLOAT))
    nodes = list[ir.Node]()
    for op, scopes in {
        "Abs": None,
        "Neg": ["model", "model.layers.0.attn.q"],
        "Exp": None,
        "Cos": ["model", "model.layers.0.attn.out"],
        "Sin": ["_empty_nn_module_stack_from_metadata_hook"],
        "Tan": ["model", "model.head"],
        "Not": None,
    }.items():
        nodes.append(_node(op, [nodes[-1].outputs[0] if nodes else given], scopes))
    nodes[0].outputs[0].shape = ir.Shape(["2*s3 + s33"])
    graph = ir.Graph([given], nodes[-1].outputs, nodes=nodes)
    name_sizes(graph)
    name_nodes(graph)
    places = ["step", "layers.0.attn.q", "layers.0.attn", "layers.0.attn.out", "step", "head", "step"]
    assert [str(node.name).rpartition("/")[0] for node in nodes] == places
    assert (given.shape, nodes[0].outputs[0].shape) == (ir.Shape(["T"]), ir.Shape(["2*T + s33"]))
