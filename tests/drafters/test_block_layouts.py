"""Checkpoints of block drafters: all layouts are read, and what cannot be meant is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from emssd_compile.drafters import BlockDrafter, head_kind
from emssd_compile.errors import CheckpointError, OptionError
from tests.drafters.head_cases import write
from tests.drafters.test_block_drafter import CONFIGS, head_of

H, V, VD, RANK, TAPS = 16, 40, 13, 3, 2
IDS = torch.arange(1, V, 3)  # [VD]
LAYERS = {
    "hidden_size": H,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": V,
    "rope_theta": 5000,
}
SPECULATORS: dict[str, Any] = {
    "speculators_model_type": "dflash",
    "architectures": ["DFlashDraftModel"],
    "speculators_config": {
        "algorithm": "dflash",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "default_proposal_method": "greedy",
    },
    "transformer_layer_config": {**LAYERS, "model_type": "qwen3"},
    "block_size": 4,
    "mask_token_id": 5,
    "draft_vocab_size": VD,
    "aux_hidden_state_layer_ids": [1, 3],
}
DSPARK = {
    **SPECULATORS,
    "speculators_model_type": "dspark",
    "markov_rank": RANK,
    "markov_head_type": "gated",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
Z_LAB: dict[str, Any] = {
    **LAYERS,
    "model_type": "qwen3",
    "architectures": ["DFlashDraftModel"],
    "block_size": 8,
    "num_target_layers": 12,
    "dflash_config": {"mask_token_id": 6, "target_layer_ids": [1, 9]},
}
DEEPSPEC: dict[str, Any] = {
    **LAYERS,
    "model_type": "qwen3",
    "architectures": ["Qwen3DSparkModel"],
    "layer_types": ["full_attention"] * 2,
    "block_size": 7,
    "mask_token_id": 8,
    "target_layer_ids": [0, 2],
    "num_anchors": 512,
    "markov_rank": RANK,
    "markov_head_type": "rnn",
    "enable_confidence_head": True,
    "confidence_head_with_markov": False,
}


def _tensors(**more: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (H, TAPS * H), "hidden_norm.weight": (H,), "norm.weight": (H,)}
    for layer in ("layers.0.", "layers.1."):
        shapes |= {f"{layer}{name}_layernorm.weight": (H,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (8, H) for name in "kv"}
        shapes |= {f"{layer}self_attn.{name}_norm.weight": (8,) for name in "qk"}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (16, H) for name in "qo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (20, H) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (H, 20)
    return {name: torch.randn(shape, generator=generator) for name, shape in {**shapes, **more}.items()}


def _maps() -> dict[str, Tensor]:
    marks = torch.zeros(V, dtype=torch.bool)
    marks[IDS] = True
    return {"d2t": IDS - torch.arange(VD), "t2d": marks}


def _markov(kind: str, rows: int, confidence: int) -> dict[str, tuple[int, ...]]:
    gate = {"gate": (RANK, H + RANK), "joint": (3 * RANK, 2 * RANK + H)}[kind]
    return {
        "markov_head.markov_w1.weight": (V, RANK),
        "markov_head.markov_w2.weight": (rows, RANK),
        f"markov_head.{kind}_proj.weight": gate,
        f"markov_head.{kind}_proj.bias": gate[:1],
        "confidence_head.proj.weight": (1, confidence),
        "confidence_head.proj.bias": (1,),
    }


FILES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "dflash": (SPECULATORS, _tensors() | _maps()),
    "dspark": (DSPARK, _tensors(**_markov("gate", VD, H + RANK), **{"lm_head.weight": (VD, H)}) | _maps()),
    "z-lab": (Z_LAB, _tensors()),
    "deepspec": (
        DEEPSPEC,
        _tensors(**_markov("joint", V, H), **{"lm_head.weight": (V, H), "embed_tokens.weight": (V, H)}),
    ),
}


def _read(folder: Any, name: str, config: dict[str, Any], tensors: dict[str, Any], **options: Any) -> BlockDrafter:
    """A file with entries and tensors changed; None for one that is left out."""
    given, weights = FILES[name]
    return BlockDrafter.from_pretrained(write(folder, {**given, **config}, {**weights, **tensors}), **options)


@pytest.mark.parametrize(
    ("name", "taps", "drafts", "mask", "borrows", "vocabulary", "heads"),
    [
        ("dflash", (0, 2), 3, 5, ("embedding", "head"), VD, (0, "vanilla", False, False)),
        ("dspark", (0, 2), 4, 5, ("embedding",), VD, (RANK, "gated", True, True)),
        ("z-lab", (1, 9), 7, 6, ("embedding", "head"), V, (0, "vanilla", False, False)),
        ("deepspec", (0, 2), 7, 8, (), V, (RANK, "rnn", True, False)),
    ],
)
def test_each_layout_is_read(tmp_path, name, taps, drafts, mask, borrows, vocabulary, heads):
    head = _read(tmp_path, name, {}, {})
    config, layer = head.config, head.config.layer
    assert head_kind(tmp_path) is BlockDrafter
    assert (head.taps, head.num_draft_tokens, config.mask_token, head.borrows) == (taps, drafts, mask, borrows)
    assert (config.hidden_size, config.vocabulary, config.draft_vocabulary) == (H, V, vocabulary)
    assert (layer.width, layer.inner, layer.heads, layer.kv_heads, layer.head_size) == (H, 20, 2, 1, 8)
    assert (layer.rotary.theta, layer.has_head_norms, config.num_layers) == (5000.0, True, 2)
    assert heads == (
        *(config.markov_rank, config.markov_head),
        *(config.has_confidence, config.confidence_reads_token),
    )
    assert vocabulary == V or torch.equal(head.draft_ids, IDS)
    for tensor, value in head.state_dict().items():
        if tensor != "draft_ids":
            assert torch.equal(value, FILES[name][1][tensor])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read(tmp_path, name):
    head = head_of(name)
    head.save_pretrained(tmp_path)
    read = BlockDrafter.from_pretrained(tmp_path)
    assert read.config == head.config
    assert read.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in read.state_dict().items())


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}


def _layers(**entries: Any) -> dict[str, Any]:
    return {"transformer_layer_config": {**SPECULATORS["transformer_layer_config"], **entries}}


def _own(**entries: Any) -> dict[str, Any]:
    return {"dflash_config": {**Z_LAB["dflash_config"], **entries}}


@pytest.mark.parametrize(
    ("name", "config", "wanted"),
    [
        ("dflash", _layers(**SLIDING), ((0,), 64, True)),
        ("dflash", {**_layers(**SLIDING), "sliding_window_non_causal": True}, ((0,), 64, False)),
        ("z-lab", SLIDING, ((0,), 64, True)),
        ("z-lab", {**SLIDING, "is_causal": False}, ((0,), 64, False)),
        ("z-lab", {**SLIDING, **_own(causal=False, swa_window_size=32)}, ((0,), 32, False)),
        ("z-lab", _own(use_swa=True, swa_window_size=32, causal=True), ((0, 1), 32, True)),
        ("z-lab", _own(causal=False), ((), 0, False)),
    ],
)
def test_what_layers_see_is_read(tmp_path, name, config, wanted):
    read = _read(tmp_path, name, config, {}).config
    assert (read.sliding_layers, read.sliding_window, read.sliding_is_causal) == wanted


def test_who_predicts_what_is_read(tmp_path):
    """Whatever number of tokens a converter wrote."""
    assert _read(tmp_path / "0", "dflash", {"sample_from_anchor": True}, {}).num_draft_tokens == 4
    assert _read(tmp_path / "1", "dspark", {"sample_from_anchor": False}, {}).num_draft_tokens == 3
    assert _read(tmp_path / "2", "z-lab", _own(shift_label=True), {}).num_draft_tokens == 8


def test_a_mask_may_be_a_vector(tmp_path):
    mask = torch.randn(1, 1, H)
    read = _read(tmp_path, "z-lab", _own(mask_token_id=None), {"mask_embedding": mask})
    assert read.config.mask_token is None
    assert torch.equal(read.mask_embedding, mask.flatten())


def test_layers_that_a_config_does_not_say(tmp_path):
    with pytest.warns(UserWarning, match=r"does not say target_layer_ids; they are taken for \[1, 9\]"):
        assert _read(tmp_path / "0", "z-lab", _own(target_layer_ids=None), {}).taps == (1, 9)
    silent = {"aux_hidden_state_layer_ids": None}
    assert _read(tmp_path / "1", "dflash", silent, {}, taps=(3, 4)).taps == (3, 4)
    with pytest.raises(OptionError, match="nothing says which layers of the target"):
        _read(tmp_path / "2", "dflash", silent, {})


def test_an_embedding_that_was_not_trained_is_the_targets(tmp_path):
    own = {"embed_tokens.weight": torch.randn(V, H)}
    assert _read(tmp_path / "0", "dflash", {}, own).borrows == ("embedding", "head")
    assert _read(tmp_path / "1", "dflash", {"embed_requires_grad": True}, own).borrows == ("head",)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("dflash", {"mask_token_id": None}, "says no mask_token_id, and holds no mask_embedding"),
        ("dflash", {"mask_token_id": V}, "BlockConfig mask_token=40 is out of range"),
        ("dflash", {"block_size": 1}, "block_size=1 drafts nothing"),
        ("dflash", {"projector_type": "domino"}, "projector_type = 'domino' is not supported; only 'dflash' is"),
        ("dflash", {"aux_hidden_state_layer_ids": [0, 3]}, "that read the embedding"),
        ("dflash", {"draft_vocab_size": 12}, "d2t is for 13 tokens, and config.json says draft_vocab_size = 12"),
        ("dflash", _layers(model_type="gemma"), "model_type 'gemma' are not supported"),
        ("dflash", _layers(layer_types=["chunked"] * 2), "expected 2 times 'full_attention' or 'sliding_attention'"),
        ("dflash", _layers(layer_types=["full_attention"]), "expected 2 times"),
        ("dflash", _layers(**{**SLIDING, "sliding_window": None}), "sliding_window is missing"),
        ("dflash", _layers(**{**SLIDING, "sliding_window": 3}), "sliding_window=3 is less than a block of 4"),
        ("dflash", _layers(use_sliding_window=True), "layer_types does not say in which layers"),
        ("dflash", {"speculators_model_type": ["dflash"]}, "is no checkpoint of a BlockDrafter"),
        ("dflash", _layers(rope_scaling="linear"), "rope_scaling is 'linear'; it is to be of type dict"),
        ("dflash", _layers(rope_parameters=[4]), r"rope_parameters is \[4\]; it is to be of type dict"),
        ("dflash", {"transformer_layer_config": {}}, "lacks 330 tensors of a BlockDrafter"),
        ("dspark", {"markov_rank": 1 << 30}, r"is \[1, 19\]; expected \[1, 1073741840\]"),
        ("z-lab", {"num_hidden_layers": 1 << 40}, "num_hidden_layers = 1099511627776; it is to be from 1 to 64"),
        ("dspark", {"markov_head_type": "cubic"}, "markov_head='cubic' is unknown"),
        ("dspark", {"markov_rank": 0}, "looks tokens up in the Markov head"),
        ("z-lab", _own(projector_type="dspark"), "dflash_config.projector_type = 'dspark' is not supported"),
        ("z-lab", _own(selector_rank=256), "dflash_config.selector_rank = 256 is not supported"),
        ("z-lab", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ("z-lab", _own(use_swa=True, swa_window_size=64), "use_swa = True needs dflash_config.causal"),
        ("z-lab", _own(causal=True), "causal = True is supported where all layers have a sliding window"),
        ("z-lab", _own(target_layer_ids=None) | {"num_target_layers": None}, "num_target_layers is missing"),
        ("deepspec", {"target_layer_ids": [-1, 2]}, r"that read the embedding \(-1\) are not supported"),
        ("deepspec", SLIDING, "in this layout all layers see everything"),
    ],
)
def test_entries_that_cannot_be_meant_are_refused(tmp_path, name, changed, message):
    with pytest.raises(CheckpointError, match=message):
        _read(tmp_path, name, changed, {})


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("dflash", {"norm.weight": None}, "lacks 1 tensors of a BlockDrafter: norm.weight"),
        ("dflash", {"encoder.fc.weight": torch.ones(1)}, "does not know: encoder.fc.weight"),
        ("dflash", {"fc.weight": torch.ones(H, H)}, r"fc.weight is \[16, 16\]; expected \[16, 32\]"),
        ("dflash", {"d2t": torch.zeros(0, dtype=torch.int64)}, r"d2t is \[0\]; expected one number for each"),
        ("dflash", {"d2t": None}, "lacks the tensor d2t"),
        ("dflash", {"d2t": torch.zeros(VD, dtype=torch.int64)}, "they do not go together"),
        ("dspark", {"markov_head.gate_proj.bias": None}, "lacks 1 tensors of a BlockDrafter: markov_head.gate_proj"),
        ("z-lab", {"layers.1.self_attn.g_proj.weight": torch.ones(1)}, "does not know: layers.1.self_attn.g_proj"),
        ("z-lab", {"mask_embedding": torch.ones(3)}, r"mask_embedding is \[3\]; expected \[16\]"),
        ("deepspec", {"confidence_head.proj.weight": torch.ones(1, 5)}, r"is \[1, 5\]; expected \[1, 16\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, changed, message):
    with pytest.raises(CheckpointError, match=message):
        _read(tmp_path, name, {}, changed)
