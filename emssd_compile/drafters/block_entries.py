"""What the configurations of block drafters have in common, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from emssd_compile.checkpoints import Checkpoint
from emssd_compile.drafters.block_config import MOST_LAYERS, BlockConfig
from emssd_compile.drafters.layer_entries import read_layer
from emssd_compile.drafters.layout_checks import refused
from emssd_compile.drafters.table_entries import read_with_tables
from emssd_compile.numeric import shown

_MASK, _KEY_NORM = "mask_embedding", "layers.0.self_attn.k_norm.weight"
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_block(
    checkpoint: Checkpoint,
    entries: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    trains_embedding: bool,
    **options: Any,
) -> tuple[BlockConfig, dict[str, Tensor]]:
    """The configuration and weights.

    Args:
        checkpoint: what it is read from.
        entries: of its layers.
        sizes: width of the target, if it is said, and what the size of the draft vocabulary is if it is not.
        trains_embedding: whether an embedding that is there differs from the target's.
        **options: attributes of the configuration.

    Raises:
        CheckpointError: an entry makes no sense, or nothing stands for tokens to be drafted.
    """
    weights = dict(checkpoint.tensors)
    layer = read_layer(checkpoint, {**entries, "layer_types": None, "use_sliding_window": False})
    layer = replace(layer, has_head_norms=_KEY_NORM in weights)  # whatever model_type says, most have them
    if _MASK in weights:
        weights[_MASK], options["mask_token"] = weights[_MASK].flatten(), None
    elif options["mask_token"] is None:
        raise refused(checkpoint, f"it says no mask_token_id, and holds no {_MASK}: nothing stands for drafts")
    options["num_layers"] = checkpoint.get("num_hidden_layers", int, within=entries)
    sizes = {**sizes, "taps": 5}
    return read_with_tables(
        checkpoint, BlockConfig, weights, layer, entries, sizes, trains_embedding=trains_embedding, **options
    )


def token(checkpoint: Checkpoint, name: str, within: Mapping[str, Any] | None = None) -> int | None:
    """The id in an entry; None if it is missing or null."""
    entries = checkpoint.config if within is None else within
    return None if entries.get(name) is None else checkpoint.get(name, int, within=within)


def neutral(checkpoint: Checkpoint, entries: Mapping[str, Any], place: str, **values: Any) -> None:
    """Refuse entries that are there, and not null or as said: they change what is computed.

    Args:
        checkpoint: what is read.
        entries: of its config.
        place: where in it they are, with a dot behind, for the message.
        **values: the only ones that are supported, by the names of entries.

    Raises:
        CheckpointError: one has another value.
    """
    for name, value in values.items():
        if entries.get(name) not in (None, value):
            raise refused(checkpoint, f"{place}{name} = {shown(entries[name])} is not supported; only {value!r} is")


def read_sliding(
    checkpoint: Checkpoint, entries: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Which layers see a window only, and how large it is: `sliding_layers` and `sliding_window`.

    Args:
        checkpoint: what is read.
        entries: of its layers.
        own: `dflash_config`, which may say it, too.

    Raises:
        CheckpointError: an entry makes no sense, or leaves open in which layers.
    """
    own, count = own or {}, checkpoint.get("num_hidden_layers", int, within=entries)
    if not 1 <= count <= MOST_LAYERS:
        raise refused(checkpoint, f"num_hidden_layers = {count}; it is to be from 1 to {MOST_LAYERS}")
    types = checkpoint.get("layer_types", list, [], within=entries)
    if not types:
        if checkpoint.get("use_sliding_window", bool, False, within=entries):
            raise refused(checkpoint, "use_sliding_window = True, and layer_types does not say in which layers")
        types = [_SLIDING if checkpoint.get("use_swa", bool, False, within=own) else _FULL] * count
    if len(types) != count or not all(kind in (_FULL, _SLIDING) for kind in types):
        raise refused(checkpoint, f"layer_types = {shown(types)}; expected {count} times {_FULL!r} or {_SLIDING!r}")
    layers = tuple(index for index, kind in enumerate(types) if kind == _SLIDING)
    if not layers:
        return {"sliding_layers": (), "sliding_window": 0}
    said = token(checkpoint, "swa_window_size", own)
    window = checkpoint.get("sliding_window", int, within=entries) if said is None else said
    return {"sliding_layers": layers, "sliding_window": window}


def written_sliding(config: BlockConfig) -> dict[str, Any]:
    """The way back."""
    if not config.sliding_layers:
        return {}
    types = [_SLIDING if index in config.sliding_layers else _FULL for index in range(config.num_layers)]
    return {"layer_types": types, "sliding_window": config.sliding_window, "use_sliding_window": True}


def read_causal(checkpoint: Checkpoint, own: Mapping[str, Any], sliding: tuple[int, ...]) -> bool:
    """Whether layers with a window see only what is before a place of its block, as z-lab's configurations have it.

    Args:
        checkpoint: what is read.
        own: `dflash_config`.
        sliding: the layers with a window.

    Raises:
        CheckpointError: other layers are to see only that, or it is left open where readers differ.
    """
    said = {**own, **({"causal": value} if (value := checkpoint.config.get("is_causal")) is not None else {})}
    if "causal" not in said:
        if checkpoint.get("use_swa", bool, False, within=own):
            raise refused(
                checkpoint, "dflash_config.use_swa = True needs dflash_config.causal, which says what a place sees"
            )
        return True
    is_causal = checkpoint.get("causal", bool, within=said)
    if is_causal and len(sliding) < checkpoint.get("num_hidden_layers", int):
        raise refused(checkpoint, "causal = True is supported where all layers have a sliding window")
    return is_causal
