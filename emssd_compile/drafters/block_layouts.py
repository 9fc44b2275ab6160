"""How checkpoints write block drafters down."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from emssd_compile.checkpoints import CONFIG, Checkpoint
from emssd_compile.drafters.block_config import BlockConfig, default_taps
from emssd_compile.drafters.block_entries import (
    neutral,
    read_block,
    read_causal,
    read_sliding,
    token,
    written_sliding,
)
from emssd_compile.drafters.draft_vocabulary import with_written_ids
from emssd_compile.drafters.layer_entries import filled, written_layer
from emssd_compile.drafters.layout_checks import refused
from emssd_compile.drafters.speculators import TYPE, read_speculative_tokens, read_taps, written_entries
from emssd_compile.numeric import shown

_ARCHITECTURES = {"dflash": "DFlashDraftModel", "dspark": "DSparkDraftModel"}


class SpeculatorsBlock:
    """vllm-project/speculators, `speculators_model_type` dflash or dspark.

    Its layer ids count what goes into layers: id i is the output of layer i - 1. How many drafts there are is said by
    `sample_from_anchor`; some converters write another number. An embedding that was not trained is the target's, and
    is not kept.
    """

    name = "speculators dflash, dspark"

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By `speculators_model_type`."""
        return config.get(TYPE) in list(_ARCHITECTURES)

    def read(self, checkpoint: Checkpoint) -> tuple[BlockConfig, dict[str, Tensor]]:
        """The head's configuration and weights."""
        where, is_dspark = checkpoint.folder / CONFIG, checkpoint.config[TYPE] == "dspark"
        neutral(checkpoint, checkpoint.config, "", projector_type="dflash")
        given = checkpoint.get("transformer_layer_config", dict, {})
        entries = filled({"model_type": "qwen3", **given}, f"{where}: transformer_layer_config")
        read_speculative_tokens(checkpoint, default=1)
        shifts = checkpoint.get("shift_label", bool, False)
        options = {
            "block_size": checkpoint.get("block_size", int, 8),
            "sample_from_anchor": checkpoint.get("sample_from_anchor", bool, is_dspark or shifts),
            "taps": read_taps(checkpoint, "aux_hidden_state_layer_ids"),
            "mask_token": token(checkpoint, "mask_token_id"),
            "sliding_is_causal": not checkpoint.get("sliding_window_non_causal", bool, False),
            **read_sliding(checkpoint, entries),
        }
        if is_dspark:
            options |= _read_heads(checkpoint)
        trained = checkpoint.get("embed_requires_grad", bool, False)
        sizes = {"target": checkpoint.get("target_hidden_size", int, 0), "draft": 32000}
        return read_block(checkpoint, entries, sizes, trains_embedding=trained, **options)

    def write(self, config: BlockConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back."""
        kind = "dspark" if config.markov_rank or config.has_confidence else "dflash"
        entries = {
            **written_entries(kind, _ARCHITECTURES[kind], config.depth),
            "transformer_layer_config": {
                **written_layer(config.layer),
                "vocab_size": config.vocabulary,
                "num_hidden_layers": config.num_layers,
                **written_sliding(config),
            },
            "block_size": config.block_size,
            "sample_from_anchor": config.sample_from_anchor,
            "mask_token_id": config.mask_token,
            "draft_vocab_size": config.draft_vocabulary,
            "target_hidden_size": config.hidden_size,
            "aux_hidden_state_layer_ids": [tap + 1 for tap in config.taps or ()],
            "sliding_window_non_causal": not config.sliding_is_causal,
            "embed_requires_grad": config.owns_embedding,
        }
        if kind == "dspark":
            entries |= {
                "markov_rank": config.markov_rank,
                "markov_head_type": config.markov_head,
                "enable_confidence_head": config.has_confidence,
                "confidence_head_with_markov": config.confidence_reads_token,
            }
        return entries, with_written_ids(weights, config.vocabulary)


class ZLabBlock:
    """z-lab/dflash: the configuration of a Qwen3 with `dflash_config`.

    Its layer ids count what comes out of layers: id i is the output of layer i.
    """

    name = "DFlash"

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By `dflash_config`."""
        return TYPE not in config and "dflash_config" in config

    def read(self, checkpoint: Checkpoint) -> tuple[BlockConfig, dict[str, Tensor]]:
        """The head's configuration and weights."""
        own = checkpoint.get("dflash_config", dict)
        known = {
            *("mask_token_id", "target_layer_ids", "block_size", "causal"),
            *("use_swa", "swa_window_size", "projector_type", "shift_label"),
        }
        scales = {"input_embedding_scale": 1.0, "output_multiplier": 1.0, "final_logit_softcapping": 0.0}
        for place, entries in (("dflash_config.", own), ("", checkpoint.config)):
            neutral(checkpoint, entries, place, projector_type="dflash", **scales)
        if unknown := sorted(name for name, value in own.items() if value and name not in known | scales.keys()):
            raise refused(checkpoint, f"dflash_config.{unknown[0]} = {shown(own[unknown[0]])} is not supported")
        entries = filled(checkpoint.config, str(checkpoint.folder / CONFIG))
        sliding = read_sliding(checkpoint, entries, own)
        options = {
            "block_size": checkpoint.get("block_size", int, 16, within={**checkpoint.config, **own}),
            "sample_from_anchor": checkpoint.get("shift_label", bool, False, within=own),
            "taps": _read_outputs(checkpoint, own) or _usual_taps(checkpoint),
            "mask_token": token(checkpoint, "mask_token_id", {**checkpoint.config, **own}),
            "sliding_is_causal": read_causal(checkpoint, own, sliding["sliding_layers"]),
            **sliding,
        }
        sizes = {"target": checkpoint.get("target_hidden_size", int, 0), "draft": entries["vocab_size"]}
        return read_block(checkpoint, entries, sizes, trains_embedding=False, **options)

    def write(self, config: BlockConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back. Heads are written in the layout of speculators, which says more."""
        raise NotImplementedError("a BlockDrafter is written in the layout of speculators")


class DeepSpecBlock:
    """deepseek-ai/DeepSpec: the configuration of a Qwen3 with that of DSpark beside it.

    Layer ids count what comes out of layers. The embedding and the LM head are the checkpoint's own.
    """

    name = "DeepSpec DSpark"

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By `target_layer_ids` and `markov_rank`."""
        return TYPE not in config and {"target_layer_ids", "markov_rank"} <= config.keys()

    def read(self, checkpoint: Checkpoint) -> tuple[BlockConfig, dict[str, Tensor]]:
        """The head's configuration and weights."""
        entries = filled(checkpoint.config, str(checkpoint.folder / CONFIG))
        sliding = read_sliding(checkpoint, entries)
        if sliding["sliding_layers"]:
            raise refused(checkpoint, "layer_types holds 'sliding_attention'; in this layout all layers see everything")
        options = {
            "block_size": checkpoint.get("block_size", int),
            "sample_from_anchor": True,
            "taps": _read_outputs(checkpoint, checkpoint.config),
            "mask_token": token(checkpoint, "mask_token_id"),
            **_read_heads(checkpoint),
        }
        sizes = {"target": 0, "draft": entries["vocab_size"]}
        return read_block(checkpoint, entries, sizes, trains_embedding=True, **options)

    def write(self, config: BlockConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back. Heads are written in the layout of speculators, which says more."""
        raise NotImplementedError("a BlockDrafter is written in the layout of speculators")


def _read_heads(checkpoint: Checkpoint) -> dict[str, Any]:
    """The Markov head and the confidence head."""
    return {
        "markov_rank": checkpoint.get("markov_rank", int, 0),
        "markov_head": checkpoint.get("markov_head_type", str, "vanilla"),
        "has_confidence": checkpoint.get("enable_confidence_head", bool, False),
        "confidence_reads_token": checkpoint.get("confidence_head_with_markov", bool, False),
    }


def _read_outputs(checkpoint: Checkpoint, within: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The layers whose outputs are read, where ids count them."""
    ids = checkpoint.get("target_layer_ids", list, [], within=within)
    if not all(type(number) is int and number >= 0 for number in ids):
        raise refused(
            checkpoint,
            f"target_layer_ids = {shown(ids)}; ids count from 0, the output of the first layer: heads that read the "
            "embedding (-1) are not supported",
        )
    return tuple(ids) or None


def _usual_taps(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The layers that are read where a config does not say it: as many as the head has layers."""
    taps = default_taps(checkpoint.get("num_target_layers", int), checkpoint.get("num_hidden_layers", int))
    warnings.warn(
        f"{checkpoint.folder / CONFIG} does not say target_layer_ids; they are taken for {list(taps)}: if few drafts "
        "are accepted, say them",
        stacklevel=2,
    )
    return taps
