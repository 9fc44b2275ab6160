"""`mask_family`: a mask is known by what it computes, and only if it is known to the longest row."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import attention
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.mask_family import MaskFamily
from emssd_compile.passes.raise_attention import RaiseAttention
from tests.passes.graphs import HEADS, LONGEST, TinyModel, apply, capture_and_apply, eager, run

MIN = torch.finfo(torch.float32).min
SLOPES = 2.0 ** -torch.arange(1.0, HEADS + 1)


def _distance(tokens: int) -> Tensor:
    """Query position minus key position."""
    return torch.arange(tokens)[:, None] - torch.arange(tokens)


def _sdpa(mask):
    """An attention whose mask is `mask(model, T)`."""

    def attend(model, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(model, q.shape[2]))

    return attend


def _additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, MIN)


def _alibi(tokens: int) -> Tensor:
    return (-SLOPES[:, None, None] * _distance(tokens))[None]


def _seen(tokens: int, window: int) -> Tensor:
    distance = _distance(tokens)
    return (distance >= 0) & (distance < window)


KNOWN = {
    "causal by comparison of positions": (0, lambda m, t: _distance(t) >= 0),
    "causal by a tril buffer": (0, lambda m, t: m.tril[:t, :t]),
    "causal, additive": (0, lambda m, t: _additive(_distance(t) >= 0)),
    "causal, -inf above the diagonal": (0, lambda m, t: torch.full((t, t), -torch.inf).triu(1)),
    "window shorter than the probe": (5, lambda m, t: _seen(t, 5)),
    "window of one token": (1, lambda m, t: _seen(t, 1)),
    "window as a literal beyond the probe": (30, lambda m, t: _seen(t, 30)),
    "window as a literal that no row reaches": (0, lambda m, t: _seen(t, 4096)),
    "window including its end": (31, lambda m, t: (_distance(t) >= 0) & (_distance(t) <= 30)),
    "window in a buffer": (30, lambda m, t: m.band30[:t, :t]),
    "window as a float": (31, lambda m, t: (_distance(t) >= 0) & (_distance(t) < 30.5)),
}


CHUNKS = {
    "chunks shorter than the first probe": (8, lambda m, t: _seen(t, t) & (_chunk(t, 8)[:, None] == _chunk(t, 8))),
    "chunks longer than the first probe": (30, lambda m, t: _seen(t, t) & (_chunk(t, 30)[:, None] == _chunk(t, 30))),
    "chunks of one token": (1, lambda m, t: torch.eye(t, dtype=torch.bool)),
    "chunks by where they begin": (30, lambda m, t: _seen(t, t) & (torch.arange(t) >= _chunk(t, 30)[:, None] * 30)),
    "chunks in a buffer": (16, lambda m, t: m.chunk16[:t, :t]),
}


def _chunk(tokens: int, length: int) -> Tensor:
    return torch.arange(tokens) // length


def _family(attend, longest: int = LONGEST) -> tuple[TinyModel, fx.GraphModule, dict[str, Any]]:
    model = TinyModel(attend=attend)
    places = torch.arange(LONGEST)
    model.register_buffer("chunk16", (places <= places[:, None]) & (places // 16 == places[:, None] // 16))
    graph_module, _ = capture_and_apply(model, DropNoops(), RaiseAttention(longest))
    (site,) = (n for n in graph_module.graph.nodes if n.target == attention)
    return model, graph_module, dict(site.kwargs)


@pytest.mark.parametrize(("window", "mask"), KNOWN.values(), ids=KNOWN)
def test_recognises_causal_masks_and_windows(window, mask):
    model, graph_module, found = _family(_sdpa(mask))
    assert (found["window"], found["alibi_slopes"]) == (window, None)
    torch.testing.assert_close(run(graph_module, LONGEST), eager(model, LONGEST), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "mask"), CHUNKS.values(), ids=CHUNKS)
def test_recognises_chunks(chunk, mask):
    model, graph_module, found = _family(_sdpa(mask))
    assert (found["chunk"], found["window"] if chunk > 1 else 0, found["alibi_slopes"]) == (
        chunk if chunk > 1 else 0,
        0,
        None,
    )
    torch.testing.assert_close(run(graph_module, LONGEST), eager(model, LONGEST), rtol=1e-5, atol=1e-5)


LONG = {
    "causal": (0, 0, lambda m, t: _distance(t) >= 0),
    "causal, -inf above the diagonal": (0, 0, lambda m, t: torch.full((t, t), -torch.inf).triu(1)),
    "window": (70_001, 0, lambda m, t: _seen(t, 70_001)),
    "window as a float": (61, 0, lambda m, t: (_distance(t) >= 0) & (_distance(t) < 60.5)),
    "window by a band": (4096, 0, lambda m, t: torch.ones(t, t).tril().triu(-4095).bool()),
    "chunks": (0, 8192, lambda m, t: _seen(t, t) & (_chunk(t, 8192)[:, None] == _chunk(t, 8192))),
    "chunks of which two fit": (
        0,
        60_000,
        lambda m, t: _seen(t, t) & (_chunk(t, 60_000)[:, None] == _chunk(t, 60_000)),
    ),
}


@pytest.mark.parametrize(("window", "chunk", "mask"), LONG.values(), ids=LONG)
def test_rows_of_100_000_tokens_are_looked_at_to_their_end(window, chunk, mask):
    """The whole relation would hold 10,000,000,000 elements."""
    _, _, found = _family(_sdpa(mask), 100_000)
    assert (found["window"], found["chunk"]) == (window, chunk)


LATE = {
    "a window from the 50,000th token on": lambda m, t: (
        (_distance(t) >= 0) & ((_distance(t) < 100) | (torch.arange(t)[:, None] < 50_000))
    ),
    "a bias that begins 90,000 tokens away": lambda m, t: torch.where(_distance(t) > 90_000, -5.0, 0.0).masked_fill(
        _distance(t) < 0, MIN
    ),
    "one token that later ones do not see": lambda m, t: (_distance(t) >= 0) & (torch.arange(t) != 99_990),
}


@pytest.mark.parametrize("mask", LATE.values(), ids=LATE)
def test_refuses_what_begins_late(mask):
    with pytest.raises(UnsupportedModelError, match="the attention mask is not supported: "):
        _family(_sdpa(mask), 100_000)


def test_refuses_a_mask_that_cannot_be_computed_to_the_end():
    with pytest.raises(
        UnsupportedModelError, match="cannot be evaluated at the end of rows of 100000 tokens"
    ) as caught:
        _family(_sdpa(lambda m, t: _seen(t, t).flip(0).flip(0)), 100_000)
    assert caught.value.remedy == "pass a smaller max_length"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [-1e4, -torch.inf, None])
def test_scores_in_float32_beside_weights_in_half_precision(dtype, fill):
    """Weights that are rounded on their way to the values differ from float32 ones by more than its rounding."""

    def attend(m, q, k, v):
        seen = _distance(q.shape[2]) >= 0
        scores = (q.float() @ k.float().transpose(-1, -2)) * 0.5
        lowest = torch.finfo(dtype).min if fill is None else fill
        return scores.masked_fill(~seen, lowest).softmax(-1).to(v.dtype) @ v

    model = TinyModel(attend=attend).to(dtype)
    graph_module, _ = capture_and_apply(model, DropNoops(), RaiseAttention(LONGEST))
    (site,) = (n for n in graph_module.graph.nodes if n.target == attention)
    assert (site.kwargs["window"], site.kwargs["alibi_slopes"]) == (0, None)
    assert run(graph_module, LONGEST).dtype == dtype


ALIBI = {
    "ALiBi": (0, lambda m, t: _alibi(t).masked_fill(_distance(t) < 0, MIN)),
    "ALiBi by key position": (
        0,
        lambda m, t: (SLOPES[:, None, None] * torch.arange(t))[None] + _additive(_distance(t) >= 0),
    ),
    "ALiBi in a window as long as the row": (0, lambda m, t: _alibi(t).masked_fill(~_seen(t, LONGEST), -torch.inf)),
    "ALiBi in a window as a float": (
        31,
        lambda m, t: _alibi(t).masked_fill((_distance(t) < 0) | (_distance(t) > 30.5), -torch.inf),
    ),
    "ALiBi in a window": (7, lambda m, t: _alibi(t).masked_fill(~_seen(t, 7), -torch.inf)),
}


@pytest.mark.parametrize(("window", "mask"), ALIBI.values(), ids=ALIBI)
def test_recognises_slopes(window, mask):
    model, graph_module, found = _family(_sdpa(mask))
    assert found["window"] == window
    slopes = getattr(graph_module, found["alibi_slopes"].target)
    torch.testing.assert_close(slopes, SLOPES, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(graph_module, LONGEST), eager(model, LONGEST), rtol=1e-5, atol=1e-5)


def _log2(positions: Tensor) -> Tensor:
    return (positions + 1.0).log2().long()


def _per_head(m: TinyModel, t: int) -> Tensor:
    return (_distance(t) >= 0) & (_distance(t) < torch.tensor([2, 3, 4, 5])[:, None, None])


UNKNOWN = {
    "prefix": ("neither causal nor", lambda m, t: (_distance(t) >= 0) | (torch.arange(t) < 4)),
    "one token of lookahead": ("neither causal nor", lambda m, t: _distance(t) >= -1),
    "not even oneself": ("neither causal nor", lambda m, t: (_distance(t) > 0) | (torch.arange(t)[:, None] == 0)),
    "chunks, both ways": (
        "neither causal nor",
        lambda m, t: torch.arange(t)[:, None] // 8 == torch.arange(t) // 8,
    ),
    "chunks that begin within the first one": (
        "neither causal nor",
        lambda m, t: m.tril[:t, :t] & ((torch.arange(t)[:, None] + 3) // 8 == (torch.arange(t) + 3) // 8),
    ),
    "chunks of growing length": (
        "neither causal nor",
        lambda m, t: m.tril[:t, :t] & (_log2(torch.arange(t)[:, None]) == _log2(torch.arange(t))),
    ),
    "the chunk before, too": (
        "neither causal nor",
        lambda m, t: m.tril[:t, :t] & (torch.arange(t)[:, None] // 8 - torch.arange(t) // 8 <= 1),
    ),
    "every second token": ("neither causal nor", lambda m, t: (_distance(t) >= 0) & (_distance(t) % 2 == 0)),
    "window with first tokens kept": (
        "neither causal nor",
        lambda m, t: (_distance(t) >= 0) & ((_distance(t) < 30) | (torch.arange(t) < 4)),
    ),
    "another window per head": ("heads see different tokens", lambda m, t: _per_head(m, t)[None]),
    "logarithmic bias": (
        "not linear in the distance",
        lambda m, t: (-(_distance(t).clamp(min=0) + 1.0).log()).masked_fill(_distance(t) < 0, MIN),
    ),
    "bias that ends beyond the probe": (
        "over 64 tokens",
        lambda m, t: (-0.1 * _distance(t).clamp(max=30)).masked_fill(_distance(t) < 0, MIN),
    ),
    "bias that begins beyond the probe": (
        "over 64 tokens",
        lambda m, t: torch.where(_distance(t) > 30, -5.0, 0.0).masked_fill(_distance(t) < 0, MIN),
    ),
}


@pytest.mark.parametrize(("reason", "mask"), UNKNOWN.values(), ids=UNKNOWN)
def test_refuses_every_other_mask(reason, mask):
    with pytest.raises(UnsupportedModelError, match=f"the attention mask is not supported: .*{reason}") as caught:
        capture_and_apply(TinyModel(attend=_sdpa(mask)), DropNoops(), RaiseAttention(LONGEST))
    assert caught.value.op == "aten.scaled_dot_product_attention.default"


def test_a_refusal_shows_the_mask():
    mask = UNKNOWN["prefix"][1]
    with pytest.raises(UnsupportedModelError, match=r"xxxx\.\.\.\.\.\.\.\.\n"):
        capture_and_apply(TinyModel(attend=_sdpa(mask)), DropNoops(), RaiseAttention(LONGEST))


class _MaskFromIds(TinyModel):
    """Hides every token with id 0, as a padding mask computed from the ids does."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mask = (_distance(input_ids.shape[1]) >= 0) & (input_ids != 0)[:, None, None]
        return self.lm_head(F.scaled_dot_product_attention(x, x, x, attn_mask=mask).transpose(1, 2).flatten(2))


def test_refuses_a_mask_that_depends_on_token_ids():
    graph_module = capture(_MaskFromIds())
    with pytest.raises(UnsupportedModelError, match="the attention mask depends on token ids"):
        apply(graph_module, DropNoops(), RaiseAttention(LONGEST))


def test_probabilities_of_a_family():
    """Window 2 and slope ln 2: a token sees itself with twice the weight of the one before it."""
    family = MaskFamily(window=2, alibi_slopes=torch.tensor([2.0]).log())
    third = torch.tensor([[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 1 / 3, 2 / 3]])
    torch.testing.assert_close(family.probabilities(torch.zeros(1, 3, 3))[0], third)
