"""`Rotary`: queries and keys are turned as transformers turns them."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from emssd_compile.drafters.rotary import Llama3Scaling, Rotary

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("scaling", "entries"),
    [(None, {"rope_type": "default"}), (Llama3Scaling(8.0, 1.0, 4.0, 256), LLAMA3)],
    ids=["default", "llama3"],
)
def test_heads_are_turned_as_by_transformers(scaling, entries):
    """Of 32 frequencies, some are fast, some slow, and some between."""
    torch.manual_seed(0)
    q, k, positions = torch.randn(1, 7, 2, 64), torch.randn(1, 7, 1, 64), torch.tensor([[0, 1, 2, 50, 51, 900, 901]])
    rope = {**entries, "rope_theta": 500.0}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=2048, rope_parameters=rope)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotary = Rotary(500.0, scaling)
    torch.testing.assert_close((rotary(q, positions), rotary(k, positions)), expected, rtol=1e-4, atol=1e-4)


def test_a_share_of_each_head_is_turned():
    heads, positions = torch.randn(3, 2, 8), torch.arange(3)
    turned = Rotary(500.0, share=0.5)(heads, positions)
    assert torch.equal(turned[..., :4], Rotary(500.0)(heads[..., :4], positions))
    assert torch.equal(turned[..., 4:], heads[..., 4:])
