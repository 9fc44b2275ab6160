"""`lower_flex_attention`: a higher-order op becomes ATen ops that are recognised like everybody's."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import attention
from emssd_compile.passes.levels import verify_captured
from emssd_compile.passes.lower_flex_attention import LowerFlexAttention
from tests.passes.graphs import HEADS, TinyModel, apply, canonical, capture_and_apply, eager, ops, run

WINDOW = 6


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j > i - WINDOW)


def _flex(mask, score=None, **options):
    def attend(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        blocks = create_block_mask(mask, None, None, tokens, tokens, device="cpu", _compile=False)
        return flex_attention(q, k, v, score(m) if score else None, blocks, **options)

    return attend


def _alibi(m: TinyModel):
    return lambda s, b, h, i, j: s - 0.5 ** (h + 1) * (i - j)


def _capped(m: TinyModel):
    return lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0)


def _with_sinks(m: TinyModel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks = create_block_mask(_causal, None, None, q.shape[2], q.shape[2], device="cpu", _compile=False)
    output, total = flex_attention(q, k, v, block_mask=blocks, return_lse=True)
    return output * torch.sigmoid(total - m.dense.bias[:HEADS].view(1, -1, 1)).unsqueeze(-1)


FORMS = {
    "causal": (4, {"window": 0}, _flex(_causal)),
    "with a scale": (4, {"scale": 0.3}, _flex(_causal, scale=0.3)),
    "grouped heads": (2, {"window": 0}, _flex(_causal, enable_gqa=True)),
    "a window": (4, {"window": WINDOW}, _flex(_within)),
    "a bias for each head": (4, {"window": 0}, _flex(_causal, _alibi)),
    "capped scores": (4, {"softcap": 3.0}, _flex(_causal, _capped)),
    "sinks": (4, {"window": 0}, _with_sinks),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("kv_heads", "kwargs", "attend"), FORMS.values(), ids=FORMS)
def test_is_recognised(kv_heads, kwargs, attend):
    model = TinyModel(attend=attend, kv_heads=kv_heads)
    graph_module, manager = canonical(model)
    assert [record.changed for record in manager.records if record.name == "lower_flex_attention"] == [1]
    (site,) = (n for n in graph_module.graph.nodes if n.target == attention)
    assert kwargs.items() <= site.kwargs.items()
    assert site.args[1].meta["val"].shape[1] == kv_heads
    for tokens in (2, 9, 40):
        torch.testing.assert_close(run(graph_module, tokens), eager(model, tokens), rtol=1e-5, atol=1e-5)


def test_leaves_other_attention_alone():
    model = TinyModel(attend=lambda m, q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v)
    graph_module, (record,) = capture_and_apply(model, LowerFlexAttention())
    assert record.changed == 0
    (again,) = apply(graph_module, LowerFlexAttention())
    assert again.changed == 0


def test_a_bidirectional_mask_is_refused():
    with pytest.raises(UnsupportedModelError, match="attention mask"):
        canonical(TinyModel(attend=_flex(lambda b, h, i, j: (j <= i) | (j > i))))


def test_other_higher_order_ops_are_named():
    def branch(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
        return torch.cond((ids > 3).any(), lambda x: x * 2, lambda x: x + 1, (x,))

    graph_module = capture(TinyModel(branch))
    assert ops(graph_module)["linear"] == 1
    with pytest.raises(UnsupportedModelError, match="higher-order wrapper"):
        verify_captured(graph_module)
