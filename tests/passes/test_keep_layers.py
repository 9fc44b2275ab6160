"""What is left of a model without some of its layers is what that smaller model computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from emssd_compile.compiler import CompiledModel
from emssd_compile.errors import OptionError, UnsupportedModelError
from emssd_compile.passes.graph import inputs
from emssd_compile.passes.keep_layers import KeepLayers
from emssd_compile.runtime.memory import allocate
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.pack import pack
from tests.captured import compile_model
from tests.exactness.models import prompt
from tests.passes.graphs import model_with_attention
from tests.zoo import toy_model

LAYERS, CAPACITY = 4, 48
TEXTS = [prompt(7), prompt(3)]


@pytest.fixture(scope="module")
def model() -> Any:
    return toy_model("llama", num_hidden_layers=LAYERS)


def _logits(compiled: CompiledModel) -> torch.Tensor:
    """Of all tokens of both texts, `[T, V]`, read into new caches."""
    history = torch.zeros(len(TEXTS), CAPACITY, dtype=torch.int64)
    for row, text in enumerate(TEXTS):
        history[row, : len(text)] = torch.tensor(text)
    known, places = torch.tensor([len(text) for text in TEXTS]), torch.arange(sum(map(len, TEXTS)))
    lengths = torch.zeros_like(known)
    packed = pack(history, known, lengths, known > 0, places, places, share=CAPACITY)
    with torch.no_grad():
        return compiled(packed, lengths, places, allocate(compiled.cache_shapes, torch.device("cpu")))[1]


@pytest.mark.parametrize(("layers", "taps"), [((0,), ()), ((0, 2), (1, -1)), ((0, 1, 3), ()), ((0, 1, 2, 3), ())])
def test_it_computes_what_a_model_with_these_layers_does(model, layers, taps):
    compiled = compile_model(model, BatchShape(len(TEXTS), CAPACITY), taps)
    thinned = compiled.with_layers(layers)
    small = copy.deepcopy(model)
    small.model.layers = nn.ModuleList(small.model.layers[layer] for layer in layers)
    for place, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = place
    with torch.no_grad():
        expected = torch.cat([small(torch.tensor([text]), use_cache=False).logits[0] for text in TEXTS])
    torch.testing.assert_close(_logits(thinned), expected, rtol=1e-4, atol=1e-5)
    names = {f"{kind}_cache_{layer}" for kind in "kv" for layer in layers}
    assert thinned.cache_shapes.keys() == names
    assert {str(n.target) for n in inputs(thinned.graph_module.graph) if "cache" in str(n.target)} == names
    assert compiled.cache_shapes.keys() > names or layers == tuple(range(LAYERS)), "the whole model is as it was"


def test_it_says_how_many_layers_it_left_out_and_finds_no_more(model):
    compiled = compile_model(model, BatchShape(len(TEXTS), CAPACITY))
    graph_module = compiled.with_layers(tuple(range(LAYERS))).graph_module
    assert KeepLayers((0, 1, 2, 3)).run(graph_module) == 0
    assert KeepLayers((0, 3)).run(graph_module) == 2


@pytest.mark.parametrize("layers", [(), (1,), (0, 4), (0, 2, 1), (0, 0), (0, -1)])
def test_layers_that_are_not_there_are_refused(model, layers):
    with pytest.raises(OptionError, match="the model has layers 0 to 3"):
        compile_model(model, BatchShape(len(TEXTS), CAPACITY)).with_layers(layers)


def test_where_layers_cannot_be_told_nothing_is_left_out():
    with pytest.raises(UnsupportedModelError, match="no list of layers was found"):
        compile_model(model_with_attention(), BatchShape(2, CAPACITY)).with_layers((0,))
