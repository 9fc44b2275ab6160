"""Toy versions of every causal LM type that transformers knows: built in a fraction of a second, odd enough to catch
a mistake.

``toy_model("llama")`` shrinks the default configuration of a type by the *names* of its fields (``hidden_size``
becomes 64, ``sliding_window`` 30, ...), keeps one layer of each kind the type has, and fills the weights with noise
loud enough for greedy decoding to wander through the vocabulary. ``OVERRIDES`` holds what names alone cannot say,
``UNAVAILABLE`` the types that are no map from token ids to logits.

The sizes are chosen to expose mistakes rather than to be round: windows and chunks are shorter than the texts of the
tests, key/value heads are fewer than query heads, and head sizes differ from ``hidden_size / heads`` wherever they do
in the real model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
UNAVAILABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs timm; gemma3n_text is the language model in it",
    "gemma4_assistant": "reads hidden states and keys of another model, not token ids",
    "gemma4_unified_assistant": "reads hidden states and keys of another model, not token ids",
    "musicgen": "one step reads and writes several codebooks; its configuration has no defaults",
    "musicgen_melody": "one step reads and writes several codebooks; its configuration has no defaults",
}

VOCABULARY = 160
POSITIONS = 128
WINDOW = 30  # real windows are longer than any check that a compiler can afford; the tests' texts are longer still
WEIGHT_STD = 0.2
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1}

_FIELDS_BY_TOY_SIZE: dict[int, str] = {
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size",
    POSITIONS: """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        model_max_length""",
    128: "attention_hidden_size",
    64: """hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size
        output_embedding_size hidden_size_global lru_width mamba_d_ssm input_size ple_embed_dim intermediate_size
        intermediate_size_mlp decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dff d_inner dim_ff
        feed_forward_size moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size dense_intermediate_size expert_ffn_hidden_size""",
    32: """q_lora_rank kv_lora_rank o_lora_rank original_max_position_embeddings router_hidden_size
        attention_head_dim encoder_hash_byte_group_vocab pronunciation_embed_dim shape_embed_dim""",
    16: """head_dim v_head_dim qk_nope_head_dim d_head dim_head kv_channels attention_head_size swa_head_dim
        linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim mamba_d_head mamba_head_dim
        mamba_headdim mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank laurel_rank adapter_rank
        gated_norm_rank hc_lowrank hidden_size_per_layer_input dim_model_base pronunciation_vocab_size
        shape_vocab_size floor_scale rel_extent image_size local_attn_chunk_length lsh_attn_chunk_length""",
    WINDOW: """sliding_window sliding_window_size window_size local_attention attention_window_size attention_chunk_size
        keep_window_size index_topk""",
    8: "qk_rope_head_dim rotary_dim d_rel chunk_size mamba_chunk_size mamba_n_heads mamba_num_heads",
    4: """num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads num_heads
        num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads
        linear_num_heads index_n_heads num_query_groups num_experts n_routed_experts num_local_experts
        moe_num_experts patch_size""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_blocks depth num_layers_per_stack num_key_value_heads num_kv_heads kv_n_heads
        swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k
        moe_k n_group n_groups zero_expert_num""",
    1: "topk_group first_k_dense_replace moe_layer_start_index moe_layer_end_index num_dense_layers num_global_layers",
}
TOY_SIZE: dict[str, int] = {name: size for size, names in _FIELDS_BY_TOY_SIZE.items() for name in names.split()}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_3D = {**_ROPE, "mrope_section": [3, 3, 2]}
_QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 24,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE_3D, "full_attention": _ROPE_3D},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
        "intermediate_size": [64] * 4,
    },
    "gemma4": {"text_config": {"head_dim": 16, "global_head_dim": 24}},
    "gemma4_text": {"head_dim": 16, "global_head_dim": 24},
    "gemma4_unified": {"text_config": {"head_dim": 16, "global_head_dim": 24}},
    "gemma4_unified_text": {"head_dim": 16, "global_head_dim": 24},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}


def toy_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The toy model of a type: fp32, in ``eval`` mode, with random weights that depend on ``seed`` alone.

    Args:
        model_type: a name of transformers' causal LM mapping, see ``MODEL_TYPES``.
        seed: of the weights.
        overrides: configuration fields to set, e.g. ``sliding_window=None``.

    Raises:
        LookupError: the type has no toy; the message is its reason in ``UNAVAILABLE``.
    """
    if model_type in UNAVAILABLE:
        raise LookupError(f"no toy model of type {model_type!r}: {UNAVAILABLE[model_type]}")
    torch.manual_seed(seed)
    build: Callable[[PreTrainedConfig], PreTrainedModel] = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(toy_config(model_type, **overrides)).float().eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    # Plain greedy decoding to the length that is asked for: no end token, no forced or forbidden ones.
    model.generation_config = GenerationConfig()
    return model


def toy_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The shrunk configuration of a type; ``overrides`` win over ``OVERRIDES``, which win over ``TOY_SIZE``."""
    return _shrink(CONFIG_MAPPING[model_type](), {**OVERRIDES.get(model_type, {}), **overrides})


def _shrink(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    layers = _representative_layers(config)
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrink(value, overrides.get(name, {}))
        elif name in TOKEN_IDS and value is not None:
            fields[name] = TOKEN_IDS[name]
        elif name == "rope_parameters" and value:
            fields[name] = _shrink_rope(value)
        elif layers and _is_per_layer(config, value):
            fields[name] = [_shrink_size(name, value[layer]) for layer in layers]
        elif isinstance(value, int) and not isinstance(value, bool) and name in TOY_SIZE:
            fields[name] = _shrink_size(name, value)
    if layers:
        fields["num_hidden_layers"] = len(layers)
    if "head_dim" in fields:
        fields["head_dim"] = _toy_head_dim(config)
    if "kv_lora_rank" in fields:  # multi-head latent attention unfolds keys and values for every query head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if "is_decoder" in vars(config):
        fields["is_decoder"] = True  # BERT and its kin are causal only when told so
    settings = {name: value for name, value in overrides.items() if not isinstance(fields.get(name), PreTrainedConfig)}
    return type(config)(**{**fields, **settings})


def _shrink_size(name: str, value: Any) -> Any:
    return min(value, TOY_SIZE[name]) if name in TOY_SIZE else value


def _shrink_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, per layer type or flat, whose trained length is short enough for the tests to pass it."""
    return {
        name: _shrink_rope(value) if isinstance(value, dict) else _shrink_size(name, value)
        for name, value in parameters.items()
    }


def _toy_head_dim(config: PreTrainedConfig) -> int:
    if getattr(config, "qk_rope_head_dim", None):
        return TOY_SIZE["qk_rope_head_dim"]  # multi-head latent attention: the field is the size of the rotated part
    sizes = vars(config)
    if sizes["head_dim"] * sizes.get("num_attention_heads", 0) == sizes.get("hidden_size"):
        return TOY_SIZE["head_dim"]
    return TOY_SIZE["head_dim"] + 8


def _is_per_layer(config: PreTrainedConfig, value: Any) -> bool:
    """Whether a field lists a kind per layer; a list of layer *indices* never repeats and is left to the type."""
    depth: int | None = getattr(config, "num_hidden_layers", None)
    if not isinstance(value, (list, tuple)) or depth is None or len(value) != depth:
        return False
    return len({repr(entry) for entry in value}) < max(depth, 3)


def _representative_layers(config: PreTrainedConfig) -> list[int]:
    """The first layer of each kind (two layers at least); empty when the type lists no kinds."""
    per_layer = {name: value for name, value in vars(config).items() if _is_per_layer(config, value)}
    if not per_layer:
        return []
    seen: set[tuple[str, str]] = set()
    layers: list[int] = []
    for layer in range(config.num_hidden_layers):
        kinds = {(name, repr(value[layer])) for name, value in per_layer.items()}
        if not kinds <= seen:
            layers.append(layer)
            seen |= kinds
    return layers if len(layers) > 1 else [0, 1]


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Loud noise for matrices; a jitter on top of the initial value for vectors (norm scales, biases, decays)."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * WEIGHT_STD if parameter.dim() > 1 else parameter + noise * (WEIGHT_STD / 2))
    for name, buffer in model.named_buffers():
        if name.endswith("bias") and buffer.is_floating_point() and buffer.dim() == 1:  # expert selection biases
            buffer.add_(torch.randn(buffer.shape, generator=generator) * (WEIGHT_STD / 2))
