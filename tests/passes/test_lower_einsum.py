"""`lower_einsum`: einsums of two tensors become the linear layers and products that they are."""

import pytest
import torch
from torch import Tensor

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.lower_einsum import LowerEinsum
from tests.passes.graphs import TinyModel, apply, canonical, capture_and_apply, causal, eager, ops, run, unpadded


def _cube(m: TinyModel) -> Tensor:
    """The dense weight as [4, 4, 16]."""
    return m.dense.weight.reshape(4, 4, 16)


def _experts(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    shares = x[0, :, :4].softmax(-1)
    return torch.einsum("te,ted->td", shares, torch.einsum("th,ehd->ted", x[0, :, :4], _cube(m)))[None]


EINSUMS = {
    "a linear layer": ({"linear": 1}, lambda m, x, ids: torch.einsum("btd,vd->btv", x, m.dense.weight)),
    "a weight the other way round": (
        {"matmul": 1},
        lambda m, x, ids: torch.einsum("btd,dv->btv", x, m.dense.weight),
    ),
    "the weight first": ({"linear": 1}, lambda m, x, ids: torch.einsum("vd,...d->...v", m.dense.weight, x)),
    "into heads": (
        {"matmul": 1},
        lambda m, x, ids: torch.einsum("btd,dhk->bhtk", x, m.dense.weight.view(16, 4, 4)).transpose(1, 2).flatten(2),
    ),
    "out of heads": (
        {"matmul": 1},
        lambda m, x, ids: torch.einsum("bthk,hkd->btd", x.unflatten(-1, (4, 4)), _cube(m)),
    ),
    "a matrix for each head": (
        {"matmul": 1},
        lambda m, x, ids: torch.einsum("bthk,hkl->bthl", x.unflatten(-1, (4, 4)), _cube(m)[..., :4]).flatten(2),
    ),
    "experts": ({"matmul": 2}, _experts),
    "a token with itself": (
        {"matmul": 1},
        lambda m, x, ids: torch.einsum("btd,btd->bt", x, x)[..., None] * x,
    ),
}


@pytest.mark.parametrize(("found", "local"), EINSUMS.values(), ids=EINSUMS)
def test_becomes_a_product(found, local):
    model = TinyModel(local)
    graph_module, (*_, record) = capture_and_apply(model, DropNoops(), LowerEinsum())
    assert record.changed == sum(found.values())
    assert not ops(graph_module)["einsum"]
    embedded = {"linear": 1}  # the LM head
    assert {n: ops(graph_module)[n] - embedded.get(n, 0) for n in found} == found
    for tokens in (2, 9):
        torch.testing.assert_close(run(graph_module, tokens), eager(model, tokens), rtol=1e-5, atol=1e-5)
    (again,) = apply(graph_module, LowerEinsum())
    assert again.changed == 0


LEFT_ALONE = {
    "three operands": lambda m, x, ids: torch.einsum("btd,de,e->bte", x, m.dense.weight, m.dense.bias),
    "no sum": lambda m, x, ids: torch.einsum("bti,btj->btij", x[..., :4], x[..., 4:8]).flatten(2),
    "a sum within one operand": lambda m, x, ids: x + torch.einsum("btd,vw->bt", x, m.dense.weight)[..., None],
}


@pytest.mark.parametrize("local", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_leaves_what_is_no_matrix_product_to_the_proof(local):
    graph_module, manager = canonical(TinyModel(local, attend=causal))
    assert ops(graph_module)["einsum"] == 1
    record = next(r for r in manager.records if r.name == "prove_token_pointwise")
    assert record.notes == ("proved: nothing but attention mixes tokens",)


MIXING = {
    "a sum over tokens": lambda m, x, ids: x + torch.einsum("btd->bd", x)[:, None],
    "tokens with tokens": lambda m, x, ids: torch.einsum("bsd,bte,bsf->btd", x, x, x),
}


@pytest.mark.parametrize("local", MIXING.values(), ids=MIXING)
def test_an_einsum_over_tokens_is_refused(local):
    with pytest.raises(UnsupportedModelError, match="tokens are mixed outside attention") as caught:
        canonical(TinyModel(local, attend=causal))
    assert "einsum" in str(caught.value.op)


def test_an_lm_head_may_be_an_einsum():
    class Head(TinyModel):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embed(input_ids)
            heads = [layer(hidden).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
            hidden = hidden + causal(self, *heads).transpose(1, 2).flatten(2)
            return torch.einsum("btd,vd->btv", hidden, self.lm_head.weight)

    graph_module, manager = unpadded(Head())
    assert next(r for r in manager.records if r.name == "select_logits").changed == 1
    assert not ops(graph_module)["einsum"]
