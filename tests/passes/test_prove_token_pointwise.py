"""`prove_token_pointwise`: a graph in which anything but attention mixes tokens is never called proved."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.lift_positions import LiftPositions
from emssd_compile.passes.prove_token_pointwise import ProveTokenPointwise, find_mixing
from emssd_compile.passes.raise_attention import RaiseAttention
from tests.passes.graphs import LONGEST, TinyModel, apply, capture_and_apply, eager, run

POINTWISE = {
    "nothing": lambda m, x, ids: x,
    "mlp": lambda m, x, ids: x + m.dense(F.gelu(m.dense(x))),
    "normalisation": lambda m, x, ids: F.layer_norm(x, (16,)) * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "heads": lambda m, x, ids: x.view(1, -1, 4, 4).transpose(1, 2).softmax(-1).transpose(1, 2).flatten(2),
    "rotation by concatenation": lambda m, x, ids: torch.cat([-x[..., 8:], x[..., :8]], -1),
    "by the ids": lambda m, x, ids: torch.where(ids[..., None] > 3, x, -x),
    "look-up": lambda m, x, ids: x + m.table[ids],
    "running sum over features": lambda m, x, ids: x.cumsum(-1),
    "sorted features": lambda m, x, ids: x.sort(-1).values,
    "each token by its own matrix": lambda m, x, ids: (x.unflatten(-1, (4, 4)) @ x.unflatten(-1, (4, 4))).flatten(2),
    "positions": lambda m, x, ids: x + m.table[torch.arange(x.shape[1])],
}


@pytest.mark.parametrize("local", POINTWISE.values(), ids=POINTWISE)
def test_proves_what_acts_on_each_token_by_itself(local):
    model = TinyModel(local)
    before = eager(model, 9)
    graph_module, records = capture_and_apply(model, DropNoops(), LiftPositions(LONGEST), ProveTokenPointwise(LONGEST))
    assert records[-1].notes == ("proved: nothing but attention mixes tokens",)
    assert records[-1].changed == 0
    torch.testing.assert_close(run(graph_module, 9), before, rtol=1e-6, atol=1e-6)


def test_attention_may_mix():
    model = TinyModel(attend=lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    _, records = capture_and_apply(
        model, DropNoops(), RaiseAttention(LONGEST), LiftPositions(LONGEST), ProveTokenPointwise(LONGEST)
    )
    assert records[-1].notes == ("proved: nothing but attention mixes tokens",)


def _mixture_of_experts(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    """Sorts the tokens by expert, runs the experts, puts the tokens back."""
    tokens = x[0]
    order = (ids[0] % 2).argsort(stable=True)
    grouped = tokens[order]
    done = torch.where((ids[0][order] % 2 == 1)[:, None], m.dense(grouped), grouped * 2)
    return torch.zeros_like(tokens).index_copy(0, order, done)[None]


@pytest.mark.parametrize("token", [0, 7, 31])
def test_a_token_that_switches_something_for_all_is_found(token):
    """Random ids of a large vocabulary would hardly ever hit it: it is drawn because it stands in the graph."""
    model = TinyModel(lambda m, x, ids: x * (1 + (ids == token).any()))
    with pytest.raises(UnsupportedModelError, match="mixed outside attention: the token dimension disappears"):
        capture_and_apply(model, DropNoops(), LiftPositions(LONGEST), ProveTokenPointwise(LONGEST))


def test_tokens_sorted_and_put_back_are_tested():
    _, records = capture_and_apply(
        TinyModel(_mixture_of_experts), DropNoops(), LiftPositions(LONGEST), ProveTokenPointwise(LONGEST)
    )
    (note,) = records[-1].notes
    assert note.startswith("tested: no token influences another, among up to 2060 tokens, at positions up to 64; ")
    assert "not proved, because of %argsort" in note


def _not_quite_put_back(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    order = (ids[0] % 2).argsort(stable=True)
    return x[0][order][None]


def _shift_by_padding(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    return x + F.pad(x, (0, 0, 1, 0))[:, :-1]


def _convolution(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    weight = torch.ones(16, 1, 3)
    return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), weight, groups=16).transpose(1, 2)


MIXING = {
    "running sum": ("cumsum", lambda m, x, ids: x.cumsum(1)),
    "running maximum": ("cummax", lambda m, x, ids: x.cummax(1).values),
    "shift by roll": ("roll", lambda m, x, ids: x + x.roll(1, 1)),
    "shift by padding": ("pad", _shift_by_padding),
    "shift by slicing": ("slice", lambda m, x, ids: x + torch.cat([x[:, :1], x[:, :-1]], 1)),
    "convolution": ("pad", _convolution),
    "mean over tokens": ("mean", lambda m, x, ids: x - x.mean(1, keepdim=True)),
    "mean over everything": ("mean", lambda m, x, ids: x - x.mean()),
    "maximum over everything": ("max", lambda m, x, ids: x / x.abs().max()),
    "norm over tokens": ("linalg_vector_norm", lambda m, x, ids: F.normalize(x, dim=1)),
    "sorted tokens": ("sort", lambda m, x, ids: x.sort(1).values),
    "softmax over tokens": ("softmax", lambda m, x, ids: x.softmax(1)),
    "softmax after a transpose": ("softmax", lambda m, x, ids: x.transpose(1, 2).softmax(-1).transpose(1, 2)),
    "batch normalisation": (
        "batch_norm",
        lambda m, x, ids: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
    ),
    "instance normalisation": ("instance_norm", lambda m, x, ids: F.instance_norm(x.transpose(1, 2)).transpose(1, 2)),
    "normalisation over tokens and features": ("layer_norm", lambda m, x, ids: F.layer_norm(x, x.shape[1:])),
    "reversed": ("flip", lambda m, x, ids: x.flip(1)),
    "first token": ("slice", lambda m, x, ids: x + x[:, :1]),
    "last token": ("select", lambda m, x, ids: x + x[:, -1, None]),
    "gather": ("gather", lambda m, x, ids: x.gather(1, (ids % 2)[..., None].expand(-1, -1, 16))),
    "index by the ids": ("index", lambda m, x, ids: x[:, ids[0] % 2]),
    "index by positions": ("index", lambda m, x, ids: x[:, torch.arange(x.shape[1])]),
    "scatter": ("scatter_add", lambda m, x, ids: x.scatter_add(1, (ids % 2)[..., None].expand(-1, -1, 16), x)),
    "concatenated along the tokens": ("cat", lambda m, x, ids: torch.cat([x, x], 1).view(1, -1, 32)[..., :16]),
    "transpose, then view": ("reshape", lambda m, x, ids: x.transpose(1, 2).reshape(1, -1, 16)),
    "tokens merged with features": ("reshape", lambda m, x, ids: x.flatten().roll(16).view(x.shape)),
    "tokens split over features": ("reshape", lambda m, x, ids: x.reshape(1, 16, -1).transpose(1, 2)),
    "as_strided": ("as_strided", lambda m, x, ids: x.contiguous().as_strided(x.shape, (0, 0, 1))),
    "unfold": ("pad", lambda m, x, ids: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).sum(-1)),
    "[T, 1] against [1, T]": ("mul", lambda m, x, ids: x + (x[:, :, None, 0] * x[:, None, :, 0]).sum(-1, keepdim=True)),
    "equal ids": ("eq", lambda m, x, ids: x * (ids[:, :, None] == ids[:, None, :]).sum(-1, keepdim=True)),
    "product over tokens": ("matmul", lambda m, x, ids: x @ (x.transpose(1, 2) @ x)),
    "bmm over tokens": ("bmm", lambda m, x, ids: torch.bmm(x, torch.bmm(x.transpose(1, 2), x))),
    "einsum": ("einsum", lambda m, x, ids: torch.einsum("bth,bsh,bsg->btg", x, x, x)),
    "matrix times vector": ("matmul", lambda m, x, ids: x + x[0, :, 0] @ x[0]),
    "dot": ("dot", lambda m, x, ids: x * torch.dot(x[0, :, 0], x[0, :, 0])),
    "fourier": ("fft_fft", lambda m, x, ids: torch.fft.fft(x, dim=1).real),
    "sorted, not put back": ("argsort", _not_quite_put_back),
    "one token written everywhere": ("select", lambda m, x, ids: torch.select_scatter(x, x[:, 0], 1, 1)),
}


@pytest.mark.parametrize(("op", "local"), MIXING.values(), ids=MIXING)
def test_refuses_what_mixes_tokens_and_names_the_op(op, local):
    graph_module = capture(TinyModel(local))
    with pytest.raises(UnsupportedModelError, match="tokens are mixed outside attention") as caught:
        apply(graph_module, DropNoops(), LiftPositions(LONGEST), ProveTokenPointwise(LONGEST))
    assert caught.value.op is not None
    assert caught.value.op.split(".")[1] == op
    assert caught.value.node in {n.name for n in graph_module.graph.nodes}
    assert caught.value.module == "model (TinyModel)"


LENGTH_AS_VALUE = {
    "factor": lambda m, x, ids: x * x.shape[1],
    "divisor": lambda m, x, ids: x / x.shape[1],
    "exponent": lambda m, x, ids: x.pow(x.shape[1]),
    "keyword argument": lambda m, x, ids: x.add(m.dense(x), alpha=x.shape[1]),
    "optional bound": lambda m, x, ids: x.clamp(max=x.shape[1] / 64),
    "shift among features": lambda m, x, ids: x.roll(x.shape[1], -1),
    "shift of a constant": lambda m, x, ids: x * m.table[0].roll(x.shape[1], -1),
    "row of a table": lambda m, x, ids: x + m.table[x.shape[1]],
    "diagonal of a constant": lambda m, x, ids: x @ m.table[:16].tril(x.shape[1] - 12),
}


@pytest.mark.parametrize("local", LENGTH_AS_VALUE.values(), ids=LENGTH_AS_VALUE)
def test_the_number_of_tokens_as_a_value_is_not_proved(local):
    graph_module, _ = capture_and_apply(TinyModel(local), DropNoops(), LiftPositions(LONGEST))
    objection = find_mixing(graph_module)
    assert objection is not None
    assert objection[1] == "it computes with the number of tokens"
