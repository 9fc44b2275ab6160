"""`simplify`: few operators. That the tokens stay the model's own is tested where models are exported."""

from __future__ import annotations

VIEWS = {"Reshape", "Squeeze", "Unsqueeze"}


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
