"""Layers that repeat are one piece, and the pieces do what the step does: token for token, whatever is in it."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

import emssd_compile
from emssd_compile import OptimizedModel
from emssd_compile.drafters import Drafter, DraftModel, EarlyExit
from emssd_compile.lowering import inductor
from emssd_compile.lowering.inductor import InductorStep
from emssd_compile.lowering.regions import Pieces, cut
from tests.zoo import VOCABULARY, toy_model

LAYERS, NEW = 6, 8
PROMPTS = [[5, 3, 8, 1], [7], [int(t) for t in torch.arange(19) * 7 % VOCABULARY]]


def _model(kind: str = "llama", **overrides: Any) -> PreTrainedModel:
    return toy_model(kind, num_hidden_layers=LAYERS, **overrides)


@pytest.fixture
def uncompiled(monkeypatch):
    """Pieces run as they are: what is tried is how they are cut, not Inductor."""

    def run(step: InductorStep, piece: fx.GraphModule) -> Any:
        return lambda *given: tuple(piece(*given).values())

    monkeypatch.setattr(InductorStep, "_compile_piece", run)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The models are small: blocks of one layer, however few its weights."""
    monkeypatch.setattr(inductor, "BYTES_PER_CALL", 1)


def _optimize(model: PreTrainedModel, drafter: Drafter | str = "none", **options: Any) -> OptimizedModel:
    return emssd_compile.optimize(model, drafter, max_batch=2, max_length=64, layout="packed", **options)


def _pieces(fast: OptimizedModel) -> Pieces:
    return cut(fast.graph_module)


def _repeated(pieces: Pieces) -> list[int]:
    """How often each piece runs that runs more than once."""
    return sorted(count for count in Counter(call.piece for call in pieces.calls).values() if count > 1)


def _expected(model: PreTrainedModel) -> list[list[int]]:
    found = []
    for ids in PROMPTS:
        text = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        found.append(text[0].tolist())
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_layers_are_one_piece(kind, uncompiled):
    model = _model(kind)
    fast = _optimize(model)
    assert _repeated(_pieces(fast)) == [LAYERS]
    assert len(_pieces(fast).graph_modules) == 3, "what is before the layers, a layer, and what is behind them"
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[]) == _expected(model)
    assert f"{LAYERS} x 1 layers are compiled once" in str(fast.explain())


def test_blocks_of_layers_that_see_different_windows(uncompiled):
    """Every third layer sees the whole text."""
    windows = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    model = toy_model("qwen2", num_hidden_layers=9, layer_types=windows, use_sliding_window=True, sliding_window=4)
    fast = _optimize(model)
    assert _repeated(_pieces(fast)) == [3]
    assert "3 x 3 layers are compiled once" in str(fast.explain())
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[]) == _expected(model)


def test_blocks_are_as_large_as_their_number_asks_for(uncompiled, monkeypatch):
    model = _model()
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(inductor, "BYTES_PER_CALL", size // 3)
    fast = _optimize(model)
    assert _repeated(_pieces(fast)) == [3]
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[]) == _expected(model)
    monkeypatch.setattr(inductor, "BYTES_PER_CALL", size)
    assert len(_pieces(_optimize(model)).calls) == 1


@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(lambda model: DraftModel(toy_model("llama", seed=1), tree=(2, 1)), id="tree of a draft model"),
        pytest.param(lambda model: EarlyExit(layers=2, num_draft_tokens=3), id="the target's own layers"),
        pytest.param(lambda model: "prompt-lookup", id="lookup"),
    ],
)
def test_the_rest_of_a_step_stays_what_it_is(drafter, uncompiled):
    """Trees move KV behind the layers, and early exit runs some of them again on the same caches."""
    model = _model()
    fast = _optimize(model, drafter(model))
    assert max(_repeated(_pieces(fast))) >= LAYERS
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[]) == _expected(model)


def test_a_layer_that_is_different_is_not_taken_for_the_others(uncompiled):
    model = toy_model("llama", num_hidden_layers=7)
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    fast = _optimize(model)
    assert _repeated(_pieces(fast)) == [5]
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[]) == _expected(model)


def test_a_value_is_held_as_long_as_something_needs_it():
    pieces = _pieces(_optimize(_model()))
    computed = {number for call in pieces.calls for number in call.returned}
    alive: set[int] = set()
    for call in pieces.calls:
        assert {*call.taken} & computed <= alive
        alive = (alive | {*call.returned}) - {*call.dropped}
    assert alive == {*pieces.results.values()} & computed, "nothing is held but results"


def test_what_is_handed_on_is_contiguous():
    """So that one block may take what another one takes, though it came from elsewhere."""
    graph = fx.Graph()
    given = graph.placeholder("given")
    turned = graph.call_function(torch.ops.aten.t.default, (given,))
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (turned, 2))
    block = graph.call_function(torch.ops.aten.add.Tensor, (doubled, 1))
    graph.output({"sum": block})
    given.meta["val"] = torch.arange(6.0).view(2, 3)
    turned.meta["val"] = given.meta["val"].t()
    doubled.meta["val"] = block.meta["val"] = turned.meta["val"] * 2
    assert not doubled.meta["val"].is_contiguous()
    block.meta["region"] = (0, 0)

    first, second = cut(fx.GraphModule(nn.Module(), graph)).graph_modules
    (handed,) = first(given.meta["val"]).values()
    assert handed.is_contiguous()
    assert torch.equal(handed, doubled.meta["val"])
    (taken,) = second.graph.find_nodes(op="placeholder")
    assert taken.meta["val"].stride() == handed.stride()


def test_weights_are_read_when_a_step_runs(uncompiled):
    """Each layer with its own weights, and with those that take their place."""
    model = _model()
    fast = _optimize(model)
    before = fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    with torch.no_grad():
        for parameter in model.model.layers[5].parameters():
            parameter.mul_(-2)
    after = fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    assert after == _expected(model) != before


def test_compiled_pieces_decode_the_models_own_tokens():
    model = _model(hidden_size=32)
    fast = _optimize(model, "prompt-lookup")
    assert fast.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[]) == _expected(model)
