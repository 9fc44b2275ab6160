"""`MTP`: a model's own layer for multi-token prediction drafts, wherever its checkpoint has it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5TextRotaryEmbedding

from emssd_compile.drafters import MTP, DynamicTree, load_head
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.head_attention import SelfFedAttention
from emssd_compile.drafters.mtp_config import MTPConfig
from emssd_compile.drafters.rotary import Rotary
from emssd_compile.errors import CheckpointError, DrafterError, OptionError
from tests.drafters.contexts import target_of
from tests.drafters.head_cases import write
from tests.drafters.llama_heads import (
    HIDDEN,
    NEW,
    PROMPTS,
    SAMPLED,
    TREE,
    features_of,
    learn,
    optimized,
    plainly,
    prepared,
    shape,
    target,
)
from tests.drafters.plain_heads import attention, mlp, part, plain_modules, plain_mtp, rms, tapped
from tests.drafters.watched import check_drafts
from tests.exactness.models import prompt
from tests.zoo import VOCABULARY

SIZES = LayerSizes(HIDDEN, 48, 4, 2, 16, has_qkv_bias=True)
CONFIG = MTPConfig(HIDDEN, VOCABULARY, SIZES)
GATED = MTPConfig(
    HIDDEN,
    VOCABULARY,
    LayerSizes(HIDDEN, 48, 4, 2, 16, rotary=Rotary(500.0, share=0.25), has_head_norms=True, is_gated=True),
)
THREE = MTPConfig(HIDDEN, VOCABULARY, SIZES, num_modules=3)
ENTRIES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 5,
    "vocab_size": VOCABULARY,
}


def head_of(config: MTPConfig = CONFIG, **options: Any) -> MTP:
    """A head of random weights."""
    torch.manual_seed(0)
    head = MTP(config, **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return head


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param(CONFIG, {}, id="chain"),
        pytest.param(CONFIG, {"tree": TREE, "reads_normalised": False}, id="tree"),
        pytest.param(GATED, {}, marks=pytest.mark.long, id="gated"),
    ],
)
def test_drafts_are_those_of_the_layer_and_tokens_the_targets(config, options):
    head, tree = head_of(config, **options), options.get("tree")
    fast, plain = optimized(head), plain_mtp(head, target())
    assert check_drafts(fast, plain, PROMPTS, tree=tree, max_new_tokens=NEW) > 20
    sampled = {**SAMPLED, "num_return_sequences": 2}
    assert check_drafts(fast, plain, PROMPTS, tree=tree, shape=shape, max_new_tokens=NEW, **sampled) > 20
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == plainly()
    assert fast.generate(PROMPTS, max_new_tokens=NEW, **sampled) == plainly(**sampled)


@pytest.mark.parametrize(
    "sizes", [{}, pytest.param({"num_draft_tokens": 2, "reads_normalised": False}, marks=pytest.mark.long)]
)
def test_of_several_modules_each_makes_one_draft_of_what_the_one_before_made(sizes):
    """Prompts are read in chunks and begin with few tokens; what was read of drafts that were wrong is read again."""
    head = head_of(THREE, **sizes)
    fast, plain = optimized(head), plain_modules(head, target())
    assert check_drafts(fast, plain, PROMPTS, max_new_tokens=NEW) > 20
    options: Any = {**SAMPLED, "max_new_tokens": 5}
    assert check_drafts(fast, plain, PROMPTS, shape=shape, **options) > 10
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == plainly()
    sampled = {**SAMPLED, "num_return_sequences": 2}
    assert fast.generate(PROMPTS, max_new_tokens=NEW, **sampled) == plainly(**sampled)


@torch.no_grad()
def test_several_modules_are_trained_on_what_they_do_when_they_draft():
    head = prepared(head_of(THREE))
    plain, texts = plain_modules(head, target()), [prompt(9), prompt(12)[:9]]
    steps = list(head.rollout(features_of(texts, head)))
    assert len(steps) == 3
    for index, logits in enumerate(steps):
        for row, text in enumerate(texts):
            for place in range(8 - index):
                output = plain.output(text[: place + 2], text[place + 2 : place + 2 + index])
                expected = plain.modules[index].logits(output)
                torch.testing.assert_close(logits[row, place], expected, rtol=1e-3, atol=1e-3)


def test_modules_that_learnt_the_targets_texts_are_mostly_right():
    """Drafts are accepted, all or in part: what stays of them is as if it had been read once."""
    torch.manual_seed(0)
    head = prepared(MTP(THREE))
    learn(head, plainly())
    fast, plain = optimized(head.eval()), plain_modules(head, target())
    assert check_drafts(fast, plain, PROMPTS, max_new_tokens=NEW) > 20
    fast.stats.reset()
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == plainly()
    assert fast.stats.num_accepted_draft_tokens > fast.stats.num_spec_steps  # more than one a row and step


def _written(folder: Any, tensors: dict[str, torch.Tensor], config: dict[str, Any] = ENTRIES) -> Any:
    """The checkpoint of a model with a layer for multi-token prediction; of the model there is one tensor."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.layers.4.mlp.up_proj.weight": torch.ones(48, HIDDEN), **tensors}, folder / "model.safetensors")
    return folder


def _renamed(
    prefix: str, own: dict[str, str], layer: str = "", of: tuple[MTPConfig, int] = (CONFIG, 0)
) -> dict[str, torch.Tensor]:
    weights = part(head_of(of[0]).state_dict(), f"mtp_layers.{of[1]}.")
    names = {name: name.partition(".")[0] for name in weights}
    return {
        prefix + (own[part] + name.removeprefix(part) if part != "layer" else layer + name.removeprefix("layer.")): (
            weights[name].clone()
        )
        for name, part in names.items()
    }


_OWN = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
MIMO = _renamed("model.mtp_layers.0.", {name: name for name in _OWN})
MIMO["model.mtp_layers.0.input_proj.weight"] = MIMO["model.mtp_layers.0.input_proj.weight"].roll(HIDDEN, 1)
GLM = _renamed("model.layers.5.", dict(zip(_OWN, ("enorm", "hnorm", "eh_proj", "shared_head.norm"), strict=True))) | {
    "model.layers.5.shared_head.head.weight": torch.ones(VOCABULARY, HIDDEN),
    "model.layers.5.embed_tokens.weight": torch.ones(1, VOCABULARY, HIDDEN)[0],
}
QWEN = {
    name: value - 1 if "norm" in name else value
    for name, value in _renamed(
        "mtp.", dict(zip(_OWN, ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"), strict=True)), "layers.0."
    ).items()
}


def _check_read(head: MTP, wanted: MTP) -> None:
    assert head.config == wanted.config
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value)


@pytest.mark.parametrize("tensors", [MIMO, GLM, QWEN], ids=["mimo", "glm", "qwen"])
def test_the_layer_is_found_in_the_targets_checkpoint(tensors, tmp_path):
    _check_read(MTP.from_pretrained(_written(tmp_path, tensors)), head_of())


_GLM = dict(zip(_OWN, ("enorm", "hnorm", "eh_proj", "shared_head.norm"), strict=True))
SEVERAL = {
    "deepseek": {k: v for n in range(3) for k, v in _renamed(f"model.layers.{5 + n}.", _GLM, of=(THREE, n)).items()},
    "mimo": {
        k: v.roll(HIDDEN, 1) if "input_proj" in k else v
        for n in range(3)
        for k, v in _renamed(f"model.mtp_layers.{n}.", {name: name for name in _OWN}, of=(THREE, n)).items()
    },
}


@pytest.mark.parametrize("tensors", SEVERAL.values(), ids=SEVERAL)
def test_several_modules_are_counted_and_written(tensors, tmp_path):
    head, wanted = MTP.from_pretrained(_written(tmp_path, tensors)), head_of(THREE)
    _check_read(head, wanted)
    assert head.num_draft_tokens == 3
    head.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 3
    _check_read(MTP.from_pretrained(tmp_path / "again"), wanted)
    config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 4
    (tmp_path / "again/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="speculative_tokens=4 is out of range: each of 3 modules makes one"):
        MTP.from_pretrained(tmp_path / "again")


@torch.no_grad()
def test_a_gated_layer_is_that_of_qwen(tmp_path):
    """transformers' own layer, whose norms have zeros where these have ones; a part of each head is turned."""
    sizes = {**ENTRIES, "head_dim": 16, "layer_types": ["linear_attention"] * 4 + ["full_attention"]}
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0]}
    entries = Qwen3_5TextConfig(**sizes, rope_parameters=rope, attn_implementation="eager")
    layer = Qwen3_5DecoderLayer(entries, 4)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    x, positions = torch.randn(1, 6, HIDDEN), torch.arange(6)[None]
    embedded = Qwen3_5TextRotaryEmbedding(entries)(x, positions.expand(3, 1, 6))
    causal = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    expected = layer(x, position_embeddings=embedded, attention_mask=causal, position_ids=positions)
    norms = {
        f"mtp.{name}.weight": torch.randn(HIDDEN) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    }
    tensors = {f"mtp.layers.0.{name}": value for name, value in layer.state_dict().items()}
    tensors |= norms | {"mtp.fc.weight": torch.randn(HIDDEN, 2 * HIDDEN)}
    config = {"text_config": {**sizes, "rope_parameters": rope, "attn_output_gate": True}}
    head = MTP.from_pretrained(_written(tmp_path, tensors, config))
    assert head.config == GATED
    torch.testing.assert_close(head.mtp_layers[0].get_submodule("layer")(x, positions, SelfFedAttention()), expected)
    head.save_pretrained(tmp_path / "again")
    _check_read(MTP.from_pretrained(tmp_path / "again"), head)


def test_several_modules_make_chains_of_as_many_drafts_at_most():
    with pytest.raises(OptionError, match="an MTP of 3 modules drafts chains only"):
        head_of(THREE, tree=TREE)
    with pytest.raises(OptionError, match="num_draft_tokens=4 is out of range: each of its 3 modules makes one draft"):
        head_of(THREE, num_draft_tokens=4)
    with pytest.raises(OptionError, match="MTPConfig num_modules=0 is out of range"):
        MTPConfig(HIDDEN, VOCABULARY, num_modules=0)


SPECULATORS: dict[str, Any] = {
    "speculators_model_type": "mtp",
    "speculators_version": "0.3.0",
    "architectures": ["MTPSpeculator"],
    "num_nextn_predict_layers": 1,
    "speculators_config": {
        "algorithm": "mtp",
        "proposal_methods": [
            {"proposal_type": "greedy", "speculative_tokens": 2, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        ],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": "some/model", "architectures": ["Qwen3ForCausalLM"]},
    },
}
OF_QWEN3: dict[str, Any] = {**ENTRIES, "model_type": "qwen3", "head_dim": 16, "rope_theta": 500.0}
OF_QWEN35: dict[str, Any] = {
    **ENTRIES,
    "model_type": "qwen3_5_text",
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize(("entries", "norms"), [(OF_QWEN3, 0.0), (OF_QWEN35, 1.0)], ids=["qwen3", "qwen3.5"])
@torch.no_grad()
def test_a_checkpoint_of_speculators_is_read(entries, norms, tmp_path):
    """By the names that are published, and computed from what the file holds; the norms of Qwen3.5 lack 1."""
    heads = 4 * 16 * (2 if norms else 1)  # with as many gates
    shapes = {
        **{f"{name}_layernorm": (HIDDEN,) for name in ("token", "hidden", "final", "input", "post_attention")},
        "input_proj": (HIDDEN, 2 * HIDDEN),
        "self_attn.q_proj": (heads, HIDDEN),
        **{f"self_attn.{kind}_proj": (2 * 16, HIDDEN) for kind in "kv"},
        "self_attn.o_proj": (HIDDEN, 4 * 16),
        **{f"self_attn.{kind}_norm": (16,) for kind in "qk"},
        **{f"mlp.{kind}_proj": (48, HIDDEN) for kind in ("gate", "up")},
        "mlp.down_proj": (HIDDEN, 48),
    }
    file = {f"mtp_layers.0.{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    folder = write(tmp_path, {**SPECULATORS, "transformer_layer_config": entries}, file)
    head = prepared(load_head(folder))
    assert isinstance(head, MTP)
    assert (head.num_draft_tokens, head.config.vocabulary, head.max_depth) == (2, VOCABULARY, None)

    text = prompt(9)
    weights = {name: value + norms * ("norm" in name) for name, value in part(file, "mtp_layers.0.").items()}
    _, hidden = tapped(target(), text, ())
    pair = target().model.embed_tokens.weight[text[1:]], hidden[:-1]
    pair = rms(pair[0], weights["token_layernorm.weight"]), rms(pair[1], weights["hidden_layernorm.weight"])
    x = torch.cat(pair, 1) @ weights["input_proj.weight"].T
    own = part(weights, "self_attn.")
    x = x + attention(own, rms(x, weights["input_layernorm.weight"]), head.config.layer)
    x = x + mlp(part(weights, "mlp."), rms(x, weights["post_attention_layernorm.weight"]))
    expected = rms(x, weights["final_layernorm.weight"]) @ target().lm_head.weight.T  # [8, V]
    first = next(head.rollout(features_of([text], head)))
    torch.testing.assert_close(first[0, :8], expected, rtol=1e-3, atol=1e-3)
    assert (head.config.layer.rotary, head.config.layer.is_gated) == (
        Rotary(500.0, share=0.25 if norms else 1.0),
        bool(norms),
    )


def test_sizes_may_be_those_of_the_text_model(tmp_path):
    folder = _written(tmp_path, QWEN, {"text_config": ENTRIES, "hidden_size": 1})
    _check_read(MTP.from_pretrained(folder), head_of())


def test_what_is_written_is_read(tmp_path):
    head = head_of(num_draft_tokens=2)
    head.save_pretrained(tmp_path)
    read = MTP.from_pretrained(tmp_path, num_draft_tokens=2)
    _check_read(read, head)
    assert json.loads((tmp_path / "config.json").read_text())["speculators_model_type"] == "mtp"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.layers.6.enorm.weight": torch.ones(HIDDEN)}, "lacks 15 tensors of a MTP: mtp_layers.1.final_layer"),
        ({"model.layers.7.enorm.weight": torch.ones(HIDDEN)}, r"modules are numbered \[5, 7\]; get those between"),
        ({"model.layers.5.self_attn.o_proj.weight": torch.ones(())}, r"o_proj.weight is \[\]; expected \[64, 64\]"),
        ({"model.layers.5.mlp.gate.weight": torch.ones(2, HIDDEN)}, "is of a mixture of experts"),
        ({"model.layers.5.self_attn.kv_a_proj_with_mqa.weight": torch.ones(2, HIDDEN)}, "multi-head latent attention"),
        ({"model.layers.5.e_proj.weight": torch.ones(2)}, "is of hyper-connections"),
        ({"model.layers.5.eh_proj.weight_scale_inv": torch.ones(2)}, "weights of 8 bits"),
        ({"model.layers.5.self_attn.q_proj.weight": torch.ones(128, HIDDEN)}, "is gated"),
        (
            {"model.layers.5.post_mlp_layernorm.weight": torch.ones(HIDDEN)},
            "does not know: mtp_layers.0.layer.post_mlp",
        ),
        ({"model.layers.5.hnorm.weight": None}, "lacks 1 tensors of a MTP: mtp_layers.0.hidden_layernorm"),
        ({"model.layers.5.enorm.weight": None}, "holds no layer for multi-token prediction"),
    ],
)
def test_layers_that_are_not_supported_are_refused(tmp_path, changed, message):
    tensors = {name: value for name, value in {**GLM, **changed}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        MTP.from_pretrained(_written(tmp_path, tensors))


def test_a_target_of_another_size_and_trees_wider_than_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(DrafterError, match="of size 64; the target's have 32"):
        head_of().prepare(target_of(None, 2, 96, VOCABULARY, 32))
    with pytest.raises(OptionError, match=f"puts {VOCABULARY + 1} tokens behind a node, and {VOCABULARY} can be"):
        head_of(tree=DynamicTree(VOCABULARY + 1, 1, VOCABULARY + 1))
    with pytest.raises(OptionError, match="MTP reads_normalised='no' is not True or False"):
        head_of(reads_normalised="no")
    with pytest.raises(OptionError, match="an MTP of width 64 cannot read a target of width 32"):
        MTPConfig(32, VOCABULARY, SIZES)
    with pytest.raises(OptionError, match="MTPConfig hidden_size=0 is out of range"):
        MTPConfig(0, VOCABULARY)
    with pytest.raises(OptionError, match="MTPConfig layer=64 is no LayerSizes"):
        MTPConfig(HIDDEN, VOCABULARY, 64)  # type: ignore[arg-type]  # that is what is tried
    with pytest.raises(CheckpointError, match=r"input_proj.weight is \[3\]; expected"):
        MTP.from_pretrained(_written(tmp_path, {**MIMO, "model.mtp_layers.0.input_proj.weight": torch.ones(3)}))
