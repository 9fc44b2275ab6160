"""Whole models that write attention, caches and names in their own ways decode as they do by themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emssd_compile
from emssd_compile.errors import UnsupportedModelError
from tests.exactness.compiled import assert_exact
from tests.exactness.models import HEADS, WIDTH, Reference, prompt
from tests.zoo import POSITIONS, VOCABULARY, toy_model

LENGTHS = (1, 7, 33)
NEW_TOKENS = 12


class _Einsum(nn.Module):
    """Everything that multiplies is an einsum, the LM head and a soft mixture of experts included."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.q, self.k, self.v = (nn.Parameter(torch.empty(WIDTH, HEADS, WIDTH // HEADS)) for _ in range(3))
        self.o = nn.Parameter(torch.empty(HEADS, WIDTH // HEADS, WIDTH))
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.Parameter(torch.empty(3, WIDTH, WIDTH))
        self.head = nn.Parameter(torch.empty(VOCABULARY, WIDTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over `[1, T, heads, D]`."""
        tokens = torch.arange(q.shape[1])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
        weights = scores.masked_fill(tokens > tokens[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        x = x / x.norm(dim=-1, keepdim=True)
        attended = self.attend(*(torch.einsum("btc,chd->bthd", x, w) for w in (self.q, self.k, self.v)))
        x = x + torch.einsum("bthd,hdc->btc", attended, self.o)
        shares = self.router(x).softmax(-1)
        x = x + torch.einsum("bte,btec->btc", shares, torch.einsum("btc,ecd->bted", x, self.experts).tanh())
        return torch.einsum("btc,vc->btv", x, self.head)


class _Sinks(_Einsum):
    """A learned logit a head beside the scores, on top."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.empty(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = torch.arange(q.shape[1])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
        scores = scores.masked_fill(tokens > tokens[:, None], -torch.inf)
        sinks = self.sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)


class _Names(_Einsum):
    """`o.1` and `o_1` are two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.empty(WIDTH, 1) for _ in range(2)])
        self.scales_1 = nn.Parameter(torch.empty(WIDTH, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (1 + (self.scales[1] - self.scales_1).sum().tanh())


@torch.no_grad()
def _loud(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    model = kind().eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.6)
    return model


def _zoo(model_type: str, attention: str = "", **overrides: Any) -> nn.Module:
    model = toy_model(model_type, **overrides)
    if attention:
        model.set_attn_implementation(attention)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "einsums": lambda: _loud(_Einsum),
    "sinks": lambda: _loud(_Sinks),
    "names that collide": lambda: _loud(_Names),
    "gpt_oss": lambda: _zoo("gpt_oss"),
    "mimo_v2_flash": lambda: _zoo("mimo_v2_flash"),
    "llama4_text": lambda: _zoo("llama4_text"),
    "granite_swa": lambda: _zoo("granite_swa"),
    "granitemoe": lambda: _zoo("granitemoe"),
    "granitemoe_swa": lambda: _zoo("granitemoe_swa"),
    "granitemoeshared": lambda: _zoo("granitemoeshared"),
    "diffllama": lambda: _zoo("diffllama"),
    "diffllama, eager": lambda: _zoo("diffllama", "eager"),
    "llama, eager": lambda: _zoo("llama", "eager"),
    "llama, flex_attention": lambda: _zoo("llama", "flex_attention"),
    "mistral, flex_attention": lambda: _zoo("mistral", "flex_attention"),
    "granitemoehybrid, use_cache among the keywords": lambda: _zoo(
        "granitemoehybrid", layer_types=["full_attention", "full_attention"]
    ),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=pytest.mark.long if name == "mistral, flex_attention" else ())
        for name, make in MODELS.items()
    ],
)
def test_tokens_are_the_models_own(make):
    model = make()
    fast = emssd_compile.optimize(
        model, drafter="prompt-lookup", max_batch=len(LENGTHS), max_length=64, backend="eager"
    )
    news = assert_exact(fast, Reference(model), [prompt(n) for n in LENGTHS], NEW_TOKENS)
    assert len({tuple(new) for new in news}) == len(news), "texts that do not depend on the prompt show nothing"


REFUSED = {
    "scores that depend on values": ("doge", 28, "the attention mask depends on token ids"),
    "keys chosen by their scores": ("hy_v4", 26, "combined with values that depend on the token ids"),
    "keys chosen by their scores, from some length on": ("hy_v4", 64, "a branch on the length that ends at 29 tokens"),
    "experts cut out by counts": ("jetmoe", 64, "the shape of a tensor depends on values"),
}


@pytest.mark.parametrize(("model_type", "max_length", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_the_model_does(model_type, max_length, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        emssd_compile.optimize(
            toy_model(model_type), drafter="none", max_batch=2, max_length=max_length, backend="eager"
        )
