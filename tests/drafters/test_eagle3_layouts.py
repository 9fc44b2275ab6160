"""Checkpoints of EAGLE-3 heads: both layouts are read, and what cannot be meant is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emssd_compile.drafters import Eagle3
from emssd_compile.drafters.rotary import Llama3Scaling, Rotary
from emssd_compile.errors import CheckpointError, OptionError
from tests.drafters.test_eagle3 import CONFIGS, head_of

H, HT, V, VD = 16, 24, 40, 13
CONFIG: dict[str, Any] = {
    "speculators_model_type": "eagle3",
    "speculators_version": "0.3.0",
    "architectures": ["Eagle3Speculator"],
    "speculators_config": {
        "algorithm": "eagle3",
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                "speculative_tokens": 5,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }
        ],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": "some/model", "architectures": ["LlamaForCausalLM"]},
    },
    "transformer_layer_config": {
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": V,
        "rope_theta": 5000,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "draft_vocab_size": VD,
    "target_hidden_size": HT,
    "eagle_aux_hidden_state_layer_ids": [1, 2, 4],
    "norm_before_residual": True,
    "embed_requires_grad": True,
}
IDS = torch.arange(1, V, 3)  # [VD]
KEYS = "layers.0.self_attn.k_proj.weight"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "fc.weight": (H, 3 * HT),
        "embed_tokens.weight": (V, H),
        "lm_head.weight": (VD, H),
        "norm.weight": (H,),
        **{f"layers.0.{name}.weight": (H,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        "layers.0.self_attn.q_proj.weight": (16, 2 * H),
        **{f"layers.0.self_attn.{kind}_proj.weight": (8, 2 * H) for kind in "kv"},
        "layers.0.self_attn.o_proj.weight": (H, 16),
        **{f"layers.0.mlp.{kind}_proj.weight": (20, H) for kind in ("gate", "up")},
        "layers.0.mlp.down_proj.weight": (H, 20),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mark = torch.zeros(V, dtype=torch.bool)
    mark[IDS] = True
    return {**made, "d2t": IDS - torch.arange(VD), "t2d": mark}


def written(folder: Any, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_checkpoint_of_speculators_is_read(tmp_path):
    head = Eagle3.from_pretrained(written(tmp_path, CONFIG, tensors()))
    config, layer = head.config, head.config.layer
    assert head.num_draft_tokens == 5
    assert head.taps == (0, 1, 3)
    assert (config.hidden_size, config.vocabulary, config.draft_vocabulary) == (HT, V, VD)
    assert (layer.width, layer.inner, layer.heads, layer.kv_heads, layer.head_size) == (H, 20, 2, 1, 8)
    assert layer.rotary == Rotary(5000.0, Llama3Scaling(8.0, 1.0, 4.0, 64))
    assert config.adds_normalised
    assert head.borrows == ()
    assert torch.equal(head.draft_ids, IDS)
    assert torch.equal(head.state_dict()[KEYS], tensors()[KEYS])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read(tmp_path, name):
    head = head_of(name)
    head.save_pretrained(tmp_path)
    read = Eagle3.from_pretrained(tmp_path)
    assert read.config == head.config
    assert read.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in read.state_dict().items())


def test_a_checkpoint_of_eagle_is_read_if_its_layers_are_said(tmp_path):
    weights = {name.replace("layers.0.", "midlayer."): value for name, value in tensors().items()}
    flat = {**CONFIG["transformer_layer_config"], "draft_vocab_size": VD, "target_hidden_size": HT}
    folder = written(tmp_path, {**flat, "architectures": ["LlamaForCausalLMEagle3"]}, weights)
    head = Eagle3.from_pretrained(folder, taps=(1, 2, 3))
    assert (head.taps, head.config.hidden_size) == ((1, 2, 3), HT)
    assert torch.equal(head.state_dict()[KEYS], tensors()[KEYS])
    assert not head.config.adds_normalised
    with pytest.raises(OptionError, match="nothing says which layers of the target"):
        Eagle3.from_pretrained(folder)


def test_an_embedding_that_was_not_trained_is_the_targets(tmp_path):
    config = copy.deepcopy(CONFIG) | {"embed_requires_grad": False, "target_hidden_size": H}
    weights = tensors()
    weights["fc.weight"] = weights["fc.weight"][:, : 3 * H].contiguous()
    assert Eagle3.from_pretrained(written(tmp_path, config, weights)).borrows == ("embedding",)


def test_ids_are_taken_for_offsets_unless_only_ids_make_sense(tmp_path):
    head = Eagle3.from_pretrained(written(tmp_path, CONFIG, tensors() | {"d2t": IDS.clone()}))
    assert torch.equal(head.draft_ids, IDS)


def test_a_silent_norm_before_residual_is_warned_of(tmp_path):
    config = {name: value for name, value in CONFIG.items() if name != "norm_before_residual"}
    with pytest.warns(UserWarning, match="does not say norm_before_residual"):
        assert not Eagle3.from_pretrained(written(tmp_path, config, tensors())).config.adds_normalised


def _method(**entries: Any) -> dict[str, Any]:
    return {"speculators_config": {"proposal_methods": [{"proposal_type": "greedy", **entries}]}}


def _layer(**entries: Any) -> dict[str, Any]:
    return {"transformer_layer_config": {**CONFIG["transformer_layer_config"], **entries}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (_method(verifier_accept_k=2), "verifier_accept_k = 2"),
        (_method(accept_tolerance=0.1), "accept_tolerance = 0.1"),
        (_method(proposal_type="sample"), "only 'greedy' is supported"),
        (_method(speculative_tokens=0), "speculative_tokens = 0"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}, "that read the embedding"),
        (_layer(model_type="gemma"), "model_type 'gemma' are not supported"),
        (_layer(rope_scaling={"rope_type": "yarn"}), "type 'yarn' are not supported"),
        (_layer(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
        (_layer(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5 is not supported"),
        (_layer(layer_types=["sliding_attention"]), "layer_types holds 'sliding_attention'"),
        (_layer(num_key_value_heads=3), "2 heads of 8 elements cannot share 3"),
        (_layer(intermediate_size="many"), "intermediate_size is 'many'"),
        (_layer(intermediate_size=0), "intermediate_size = 0"),
        ({"draft_vocab_size": 12}, "d2t is for 13 tokens, and config.json says draft_vocab_size = 12"),
        ({"draft_vocab_size": 41}, "draft_vocabulary=41 is out of range"),
        ({"norm_before_fc": True}, "lacks 1 tensors of a Eagle3: input_norm.weight"),
        ({"fc_norm": True}, "lacks 3 tensors of a Eagle3: fc_norm.0.weight"),
    ],
)
def test_entries_that_cannot_be_meant_are_refused(tmp_path, changed, message):
    with pytest.raises(CheckpointError, match=message):
        Eagle3.from_pretrained(written(tmp_path, {**CONFIG, **changed}, tensors()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm.weight": None}, "lacks 1 tensors of a Eagle3: norm.weight"),
        ({"verifier_norm.weight": torch.ones(H)}, "does not know: verifier_norm.weight"),
        ({"fc.weight": torch.ones(H, HT)}, r"fc.weight is \[16, 24\]; expected \[16, 72\]"),
        ({"d2t": None}, "lacks the tensor d2t"),
        ({"d2t": torch.zeros(VD, dtype=torch.int64)}, "they do not go together"),
        ({"d2t": torch.arange(VD) * 9}, "they do not go together"),
        ({"d2t": torch.zeros(VD, 1, dtype=torch.int64)}, r"d2t is \[13, 1\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, changed, message):
    weights = {name: value for name, value in {**tensors(), **changed}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        Eagle3.from_pretrained(written(tmp_path, CONFIG, weights))


@pytest.mark.parametrize(
    ("said", "scaled", "reach"),
    [(None, True, None), (64, False, 64), (64, True, 8 * 64), (1024, True, 1024)],
    ids=["nothing", "as said", "stretched", "stretched already"],
)
def test_how_far_positions_reach_is_read_and_written(said, scaled, reach, tmp_path):
    entries = {**CONFIG["transformer_layer_config"], "max_position_embeddings": said}
    if not scaled:
        del entries["rope_scaling"]
    head = Eagle3.from_pretrained(written(tmp_path, {**CONFIG, "transformer_layer_config": entries}, tensors()))
    assert head.config.layer.longest == reach
    head.save_pretrained(tmp_path)
    assert Eagle3.from_pretrained(tmp_path).config == head.config
