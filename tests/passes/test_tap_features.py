"""`tap_features`: the outputs of decoder layers, found without knowing any architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emssd_compile.compiler import CompiledModel, compile_model
from emssd_compile.errors import OptionError, UnsupportedModelError
from tests.passes.graphs import BATCH, COMMITTED, HEADS, HIDDEN, ROWS, VOCABULARY, model_with_attention, run_packed
from tests.zoo import toy_model

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "gpt_neox", "phi", "opt", "bloom"),
    *("mixtral", "cohere", "falcon"),
)
LAYERS = 3


def assert_taps(compiled: CompiledModel, expected: Callable[[Tensor], list[Tensor]]) -> None:
    """The taps of the tokens of `ROWS` are those of each row alone.

    Args:
        compiled: taps every layer, in order.
        expected: the outputs [tokens, H] of all layers for token ids [1, tokens], without a cache.
    """
    texts = [torch.cat(parts) for parts in zip(COMMITTED, ROWS, strict=True)]
    with torch.no_grad():
        alone = [expected(text[None]) for text in texts]
    for layer, tap in enumerate(run_packed(compiled.graph_module, ROWS, COMMITTED)[2:]):
        of_rows = [row[layer][len(row[layer]) - len(new) :] for row, new in zip(alone, ROWS, strict=True)]
        torch.testing.assert_close(tap, torch.cat(of_rows), rtol=1e-4, atol=1e-4)


def returned(layers: Iterable[nn.Module], model: nn.Module, ids: Tensor) -> list[Tensor]:
    """What each of `layers` returns, [tokens, H], when the model reads `ids`."""
    found: list[Tensor] = []

    def note(module: nn.Module, given: Any, result: Any) -> None:
        value = result if isinstance(result, Tensor) else result[0]
        found.append(value.flatten(0, -2))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_taps_are_the_hidden_states_of_hugging_face(architecture):
    model: Any = toy_model(architecture)
    count = model.config.num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)

    def hidden_states(ids: Tensor) -> list[Tensor]:
        _, *states, _ = model(ids, output_hidden_states=True, use_cache=False).hidden_states  # the last is normalised
        assert len(states) == count - 1
        return [*(state[0] for state in states), *returned(layers[-1:], model, ids)]

    assert_taps(compile_model(model, BATCH, tuple(range(count))), hidden_states)


class Layer(nn.Module):
    """Attention and two linear layers, each added to the residual stream."""

    index: int

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        self.mix = nn.Parameter(torch.randn(HIDDEN, HIDDEN))

    def attend(self, x: Tensor, values: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        v = v if values is None else v + values.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.mlp(x)


class TwoAttentions(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return super().forward(x + self.attend(x))


class EndsWithEinsum(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,de->bte", super().forward(x), self.mix)


class BeginsWithEinsum(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.einsum("btd,de->bte", x, self.mix))


class WithoutAttention(Layer):
    """Every other layer is without attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) if self.index % 2 else super().forward(x)


class Shared(Layer):
    """All layers call one module, as in Zamba."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.shared(x))


class Stack(nn.Module):
    """Embedding, three layers, a norm, LM head."""

    def __init__(self, layer: Callable[[], Layer] = Layer) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        layers = [layer() for _ in range(LAYERS)]
        for index, one in enumerate(layers):
            one.index = index
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.embed(ids))))

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TokensOnly(Stack):
    """Hidden states are [T, H]."""

    def run(self, x: Tensor) -> Tensor:
        return super().run(x[0])[None]


class OfTokens(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[None])[0]


class FirstValues(Stack):
    """Every layer attends to the values of the first, too."""

    def run(self, x: Tensor) -> Tensor:
        values = None
        for layer in self.layers:
            x, values = layer(x, values)
        return x


class KeepsValues(Layer):
    def forward(self, x: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        own = self.mix @ x.transpose(1, 2)
        x = x + self.attend(x, values)
        return x + self.mlp(x), own.transpose(1, 2) if values is None else values


class EmbeddedAgain(Stack):
    """Every layer reads the embedding of the token beside the stream."""

    def run(self, x: Tensor) -> Tensor:
        embedded = x
        for layer in self.layers:
            x = layer(x, embedded)
        return x


class ReadsEmbedding(Layer):
    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + embedded @ self.mix)


def with_shared_module() -> Stack:
    shared = Layer()
    return Stack(lambda: Shared(shared))


BY_HAND: dict[str, Callable[[], Stack]] = {
    "plain": Stack,
    "two attentions in a layer": lambda: Stack(TwoAttentions),
    "an einsum last in a layer": lambda: Stack(EndsWithEinsum),
    "an einsum first in a layer": lambda: Stack(BeginsWithEinsum),
    "layers without attention": lambda: Stack(WithoutAttention),
    "a module that all layers call": with_shared_module,
    "no dimension of size 1": lambda: TokensOnly(OfTokens),
    "values of the first layer": lambda: FirstValues(KeepsValues),
    "embeddings beside the stream": lambda: EmbeddedAgain(ReadsEmbedding),
}


@pytest.mark.parametrize("build", BY_HAND.values(), ids=BY_HAND)
def test_taps_are_what_the_layers_of_a_model_by_hand_return(build):
    torch.manual_seed(0)
    model = build()
    compiled = compile_model(model, BATCH, tuple(range(LAYERS)))
    assert_taps(compiled, lambda ids: returned(model.layers, model, ids))


class AddedOutside(Stack):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class ScaledBetween(Stack):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * 0.5
        return x


class LastAddedOutside(Stack):
    """The embedding is added behind the last layer."""

    def run(self, x: Tensor) -> Tensor:
        return x + super().run(x)


class AddsLate(Layer):
    """Returns the stream, and what the next layer adds to it, as vLLM's layers do."""

    def forward(self, x: Tensor, late: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = x if late is None else x + late
        x = x + self.attend(x)
        return x, self.mlp(x)


class Late(Stack):
    def run(self, x: Tensor) -> Tensor:
        late: Any = None
        for layer in self.layers:
            x, late = layer(x, late)
        return x + late


class Twice(Stack):
    def run(self, x: Tensor) -> Tensor:
        return super().run(super().run(x))


class Backwards(Stack):
    def run(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class Nested(Layer):
    """Two attentions in a list of the layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[1](self.parts[0](x))


class Streams(Stack):
    """Two streams side by side, as in hyper-connections."""

    def run(self, x: Tensor) -> Tensor:
        return super().run(torch.stack([x, x])).sum(0)


class OfTwoStreams(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super().forward(x[0]), x[1] + x[0]])


class Lists(Stack):
    """Attentions in two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList([Layer()])

    def run(self, x: Tensor) -> Tensor:
        return self.more[0](super().run(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no list": (model_with_attention, "no list of layers"),
    "one list for everything": (
        lambda: nn.Sequential(
            nn.Embedding(VOCABULARY, HIDDEN), Layer(), Layer(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        ).eval(),
        "is it a layer",
    ),
    "two lists": (Lists, "several lists"),
    "a list in each layer": (lambda: Stack(Nested), "holds a list of attentions"),
    "layers that run twice": (Twice, "more than once"),
    "layers that run backwards": (Backwards, "of no later one"),
    "outputs added outside": (AddedOutside, "of no later one"),
    "outputs scaled outside": (ScaledBetween, "of no later one"),
    "something past the last layer": (LastAddedOutside, "not all that the logits are made of"),
    "two values for the next layer": (lambda: Late(AddsLate), "does not give one value"),
    "two streams": (lambda: Streams(OfTwoStreams), "not [1, T, H]"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_models_whose_layers_cannot_be_told(build, reason):
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError) as refused:
        compile_model(build(), BATCH, (-1,))
    assert reason in str(refused.value)


def test_gives_layers_in_the_order_asked_for():
    model = Stack()
    _, _, *every = run_packed(compile_model(model, BATCH, (0, 1, 2)).graph_module, ROWS, COMMITTED)
    taps = (-1, 0, -3, 2, 1)
    _, _, *chosen = run_packed(compile_model(model, BATCH, taps).graph_module, ROWS, COMMITTED)
    assert len(chosen) == len(taps)
    for tap, value in zip(taps, chosen, strict=True):
        assert torch.equal(value, every[tap])


@pytest.mark.parametrize("tap", [3, -4])
def test_says_how_many_layers_there_are(tap):
    with pytest.raises(OptionError, match=f"layer {tap} was asked for; the model has 3 layers"):
        compile_model(Stack(), BATCH, (0, tap))


def _nodes(compiled: CompiledModel) -> list[tuple[str, str]]:
    return [(n.name, str(n.args)) for n in compiled.graph_module.graph.nodes if n.op != "output"]


def test_adds_results_and_changes_nothing_else():
    model = Stack()
    plain, tapped = compile_model(model, BATCH), compile_model(model, BATCH, (1, -1))
    assert (plain.taps, tapped.taps) == ((), (1, -1))
    assert "tap_features" not in {record.name for record in plain.records}
    assert tapped.records[-1].changed == 2
    assert _nodes(tapped)[:-2] == _nodes(plain)
    assert str(tapped.named().graph) == str(plain.named().graph)
