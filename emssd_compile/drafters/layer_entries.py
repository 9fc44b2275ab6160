"""Sizes of decoder layers as the configurations of Hugging Face models write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emssd_compile.checkpoints import CONFIG, Checkpoint
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.rotary import Llama3Scaling, Rotary
from emssd_compile.errors import CheckpointError
from emssd_compile.numeric import shown

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "qwen3_5_text": {
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
    },
}
"""What a configuration that is silent means, by its `model_type`."""

_NEVER = {"use_sliding_window": False, "partial_rotary_factor": 1.0, "hidden_act": "silu", "pretraining_tp": 1}
"""Entries that change what a layer computes, in ways that are not supported, unless they have these values."""


GATED = "qwen3_5_text"
"""Layers whose attention is gated: they may turn a part of each head only, and the weights of their norms lack 1."""

_LARGEST = 1 << 20
"""No size of a layer is larger than this."""


def filled(entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration with the defaults of its `model_type` (llama if it says none).

    Raises:
        CheckpointError: it is of another type.
    """
    kind = entries.get("model_type") or "llama"
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise CheckpointError(f"{where}: layers of model_type {shown(kind)} are not supported; {list(_DEFAULTS)} are")
    return {**_DEFAULTS[kind], **{name: value for name, value in entries.items() if value is not None}}


def read_layer(checkpoint: Checkpoint, entries: Mapping[str, Any]) -> LayerSizes:
    """The sizes of its layers, of a configuration that is `filled`.

    Raises:
        CheckpointError: an entry makes no sense, or asks for what the layers do not do.
    """
    where, kind = checkpoint.folder / CONFIG, entries.get("model_type")
    said = {**checkpoint.get("rope_parameters", dict, {}, within=entries), **entries}
    for name, value in _NEVER.items():
        if said.get(name, value) != value and (kind, name) != (GATED, "partial_rotary_factor"):
            raise CheckpointError(f"{where}: {name} = {shown(said[name])} is not supported; only {value!r} is")
    if kind != GATED and (others := set(entries.get("layer_types") or ()) - {"full_attention"}):
        raise CheckpointError(f"{where}: layer_types holds {sorted(others)[0]!r}; only 'full_attention' is supported")

    def size(name: str, default: int | None = None) -> int:
        given: int = checkpoint.get(name, int, *(() if default is None else (default,)), within=entries)
        if not 1 <= given <= _LARGEST:
            raise CheckpointError(f"{where}: {name} = {given}; it is to be from 1 to {_LARGEST}")
        return given

    def flag(name: str) -> bool:
        return checkpoint.get(name, bool, False, within=entries)

    width, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads, has_bias = size("num_key_value_heads", heads), flag("attention_bias")
    head_size = size("head_dim", width // heads)
    rotary = _read_rotary(checkpoint, entries)
    if not 0 < rotary.share <= 1 or (turned := int(head_size * rotary.share)) < 2 or turned % 2:
        raise CheckpointError(
            f"{where}: partial_rotary_factor = {rotary.share} of heads of {head_size} is no even number of elements"
        )
    if heads % kv_heads or head_size % 2:
        raise CheckpointError(
            f"{where}: {heads} heads of {head_size} elements cannot share {kv_heads} of keys and values, or be turned"
        )
    return LayerSizes(
        width=width,
        inner=size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        epsilon=checkpoint.get("rms_norm_eps", float, 1e-6, within=entries),
        rotary=rotary,
        has_head_norms=kind in ("qwen3", GATED),
        has_qkv_bias=has_bias or kind == "qwen2",
        has_output_bias=has_bias,
        has_mlp_bias=flag("mlp_bias"),
        is_gated=kind == GATED,
        longest=_read_longest(checkpoint, entries, rotary),
    )


def _read_longest(checkpoint: Checkpoint, entries: Mapping[str, Any], rotary: Rotary) -> int | None:
    """Tokens of a row: as many as are said, or farther, where positions are stretched."""
    said: int | None = checkpoint.get("max_position_embeddings", int, None, within=entries)
    if said is None or rotary.scaling is None:
        return said
    return max(said, int(rotary.scaling.factor * rotary.scaling.original_length))


def _read_rotary(checkpoint: Checkpoint, entries: Mapping[str, Any]) -> Rotary:
    """Of `rope_theta` and `rope_scaling`, or of `rope_parameters`, which holds both."""
    given: dict[str, Any] = {
        name: value
        for within in ("rope_scaling", "rope_parameters")
        for name, value in checkpoint.get(within, dict, {}, within=entries).items()
    }
    theta = checkpoint.get("rope_theta", float, 10000.0, within={**entries, **given})
    default = _DEFAULTS.get(entries.get("model_type") or "llama", {}).get("partial_rotary_factor", 1.0)
    share = checkpoint.get("partial_rotary_factor", float, default, within={**entries, **given})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rotary(theta, share=share)
    if kind != "llama3":
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG}: rotary positions of type {shown(kind)} are not supported; default and "
            "llama3 are"
        )
    scaling = Llama3Scaling(
        checkpoint.get("factor", float, within=given),
        checkpoint.get("low_freq_factor", float, within=given),
        checkpoint.get("high_freq_factor", float, within=given),
        checkpoint.get("original_max_position_embeddings", int, within=given),
    )
    return Rotary(theta, scaling, share)


def written_layer(sizes: LayerSizes) -> dict[str, Any]:
    """The way back; `model_type` is the one whose layers are like these."""
    kind = "qwen3" if sizes.has_head_norms else "qwen2" if sizes.has_qkv_bias > sizes.has_output_bias else "llama"
    rotary: dict[str, Any] = {"rope_theta": sizes.rotary.theta}
    if sizes.is_gated:
        kind, rotary["partial_rotary_factor"] = GATED, sizes.rotary.share
    if (scaling := sizes.rotary.scaling) is not None:
        rotary["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {
        "model_type": kind,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_size,
        "rms_norm_eps": sizes.epsilon,
        **({} if sizes.longest is None else {"max_position_embeddings": sizes.longest}),
        **rotary,
        **({"attention_bias": sizes.has_qkv_bias} if kind != "qwen2" else {}),
        **({"mlp_bias": sizes.has_mlp_bias} if kind == "llama" else {}),
    }
