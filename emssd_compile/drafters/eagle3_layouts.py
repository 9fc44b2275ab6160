"""How checkpoints write EAGLE-3 heads down."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from emssd_compile.checkpoints import CONFIG, Checkpoint
from emssd_compile.drafters.draft_vocabulary import with_written_ids
from emssd_compile.drafters.eagle3_config import Eagle3Config
from emssd_compile.drafters.layer_entries import filled, read_layer, written_layer
from emssd_compile.drafters.speculators import TYPE, read_speculative_tokens, read_taps, written_entries
from emssd_compile.drafters.table_entries import read_with_tables


class SpeculatorsEagle3:
    """vllm-project/speculators, `speculators_model_type` eagle3.

    Its layer ids count what goes into layers: id i is the output of layer i - 1. An embedding that was not trained is
    the target's, and is not kept.

    Attributes:
        model_type, architecture: what the configuration calls it.
        trains_embedding, speculative_tokens: what is meant where nothing is said.
    """

    name = "speculators eagle3"
    model_type = "eagle3"
    architecture = "Eagle3Speculator"
    trains_embedding = False
    speculative_tokens = 4

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By `speculators_model_type`."""
        return config.get(TYPE) == self.model_type

    def read(self, checkpoint: Checkpoint) -> tuple[Eagle3Config, dict[str, Tensor]]:
        """The head's configuration and weights."""
        where = checkpoint.folder / CONFIG
        entries = filled(checkpoint.get("transformer_layer_config", dict, {}), f"{where}: transformer_layer_config")
        if "norm_before_residual" not in checkpoint.config:
            warnings.warn(
                f"{where} does not say norm_before_residual; it is taken for false, as speculators does, where vLLM "
                "takes it for true: if few drafts are accepted, say it",
                stacklevel=2,
            )
        options = {
            "adds_normalised": checkpoint.get("norm_before_residual", bool, False),
            "normalises_features": checkpoint.get("norm_before_fc", bool, "input_norm.weight" in checkpoint.tensors),
            "normalises_taps": checkpoint.get("fc_norm", bool, "fc_norm.0.weight" in checkpoint.tensors),
            "feeds_on_normalised": checkpoint.get("norm_output", bool, False),
            "num_layers": checkpoint.get("num_hidden_layers", int, within=entries),
            "taps": read_taps(checkpoint, "eagle_aux_hidden_state_layer_ids"),
            "speculative_tokens": read_speculative_tokens(checkpoint, self.speculative_tokens),
        }
        trained = checkpoint.get("embed_requires_grad", bool, self.trains_embedding)
        sizes = {"target": checkpoint.get("target_hidden_size", int, 0), "draft": 32000}
        return _read(checkpoint, checkpoint.tensors, entries, sizes, trains_embedding=trained, **options)

    def write(self, config: Eagle3Config, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back."""
        layer = written_layer(config.layer)
        entries = {
            **written_entries(self.model_type, self.architecture, config.speculative_tokens),
            "transformer_layer_config": {
                **layer,
                "vocab_size": config.vocabulary,
                "num_hidden_layers": config.num_layers,
            },
            "draft_vocab_size": config.draft_vocabulary,
            "target_hidden_size": config.hidden_size,
            "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in config.taps or ()],
            "norm_before_residual": config.adds_normalised,
            "norm_before_fc": config.normalises_features,
            "fc_norm": config.normalises_taps,
            "norm_output": config.feeds_on_normalised,
            "embed_requires_grad": config.owns_embedding,
        }
        return entries, with_written_ids(weights, config.vocabulary)


class OriginalEagle3:
    """SafeAILab/EAGLE, as safetensors: the layer is called `midlayer`, and nothing says which layers it reads.

    Attributes:
        trains_embedding, speculative_tokens: what is meant where nothing is said.
    """

    name = "EAGLE-3"
    trains_embedding = False
    speculative_tokens = 4

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By the names of the layer's tensors."""
        return TYPE not in config and "mask_hidden" not in names and any(n.startswith("midlayer.") for n in names)

    def read(self, checkpoint: Checkpoint) -> tuple[Eagle3Config, dict[str, Tensor]]:
        """The head's configuration and weights."""
        entries = filled(checkpoint.config, str(checkpoint.folder / CONFIG))
        renamed = {name.replace("midlayer.", "layers.0.", 1): value for name, value in checkpoint.tensors.items()}
        sizes = {"target": checkpoint.get("target_hidden_size", int, 0), "draft": entries["vocab_size"]}
        options = {
            "num_layers": len({name.split(".")[1] for name in renamed if name.startswith("layers.")}) or 1,
            "speculative_tokens": self.speculative_tokens,
        }
        return _read(checkpoint, renamed, entries, sizes, trains_embedding=self.trains_embedding, **options)

    def write(self, config: Eagle3Config, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back. Heads are written in the other layout, which says more."""
        raise NotImplementedError("an EAGLE-3 head is written in the layout of speculators")


def _read(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    trains_embedding: bool,
    **options: Any,
) -> tuple[Eagle3Config, dict[str, Tensor]]:
    """The configuration and weights.

    Args:
        checkpoint: what it is read from.
        tensors: by the head's own names, but for those of the draft vocabulary.
        entries: of its layers.
        sizes: width of the target, if it is said, and what the size of the draft vocabulary is if it is not.
        trains_embedding: whether an embedding that is there differs from the target's.
        **options: attributes of the configuration.
    """
    layer, sizes = read_layer(checkpoint, entries), {**sizes, "taps": 3}
    return read_with_tables(
        checkpoint, Eagle3Config, tensors, layer, entries, sizes, trains_embedding=trains_embedding, **options
    )
