"""`simplify`: few operators. That the tokens stay the model's own is tested where models are exported."""

from __future__ import annotations

import onnx
import pytest

from tests.exactness.compiled import target

VIEWS = {"Reshape", "Squeeze", "Unsqueeze"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> onnx.GraphProto:
    """A Llama, whose own attention has heads before tokens and groups of query heads."""
    folder = tmp_path_factory.mktemp("llama") / "artifact"
    compiled = target("llama", 3)
    compiled.optimize(compiled.drafter("none")).export_onnx(folder)
    return onnx.load(folder / "step.onnx").graph


def test_heads_and_tokens_never_change_places(llama):
    kinds = {node.op_type for node in llama.node}
    ways = [tuple(node.attribute[0].ints) for node in llama.node if node.op_type == "Transpose"]
    assert "RotaryEmbedding" in kinds
    assert not {(0, 2, 1, 3), (1, 0, 2)}.intersection(ways)


def test_memory_gets_another_shape_only_once(llama):
    views = {node.output[0]: node.input[0] for node in llama.node if node.op_type in VIEWS}
    assert not [source for source in views.values() if source in views]


def test_a_size_is_asked_once(llama):
    asked = [(node.input[0], *(a.i for a in node.attribute)) for node in llama.node if node.op_type == "Shape"]
    assert len(asked) == len(set(asked))
