"""How checkpoints write layers for multi-token prediction down, most of them beside the model that they belong to."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from emssd_compile.checkpoints import CONFIG, Checkpoint
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.layer_entries import GATED, filled, read_layer, written_layer
from emssd_compile.drafters.layout_checks import configured, refused
from emssd_compile.drafters.mtp_config import MTPConfig
from emssd_compile.drafters.speculators import TYPE, read_speculative_tokens, written_entries
from emssd_compile.errors import CheckpointError
from emssd_compile.numeric import shown

_OWN = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
_PARTS = re.compile(r"(model\.mtp_layers\.|mtp_layers\.|model\.layers\.|mtp\.)(\d+\.)?(.+)")
_UNSUPPORTED = {
    ".mlp.experts.": "a mixture of experts",
    ".mlp.gate.": "a mixture of experts",
    ".self_attn.kv_a_proj": "multi-head latent attention",
    "weight_scale_inv": "weights of 8 bits",
    ".e_proj.": "hyper-connections",
}
"""What a layer may hold that this one cannot, by parts of names."""


class _Part(NamedTuple):
    """A tensor's name: of which layout and module it is, and what comes behind that."""

    prefix: str
    module: str
    name: str


def _split(name: str) -> _Part | None:
    found = _PARTS.fullmatch(name)
    return _Part(found[1], (found[2] or "").rstrip("."), found[3]) if found else None


def _layers_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries that say what the target's layers are."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def is_of_mtp(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to a layer for multi-token prediction."""
    part = _split(name)
    if part is None:
        return False
    if part.prefix == "model.layers.":
        count = _layers_of(config).get("num_hidden_layers")
        return isinstance(count, int) and part.module.isdecimal() and int(part.module) >= count
    return True


def _shifted(name: str, value: Tensor, added: int) -> Tensor:
    """The weights of a norm with a number added, and other tensors as they are."""
    return value + added if "norm" in name else value


class _Layout:
    """What the layouts have in common.

    Attributes:
        name: whose it is.
        prefix: of all names.
        renamed: what the head's own parts are called there; the others are those of an ordinary layer.
        layer: what comes before the names of the ordinary layer.
        copies: parts that are copies of the target's.
        may_be_gated: whether attention may be.
    """

    name: str
    prefix: str
    renamed: ClassVar[Mapping[str, str]] = {name: name for name in _OWN}
    layer = ""
    copies: tuple[str, ...] = ()
    may_be_gated = False

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By the names of tensors."""
        parts = [_split(name) for name in names if is_of_mtp(config, name)]
        first = next(iter(self.renamed.values()))
        return any(p is not None and p.prefix == self.prefix and p.name.startswith(f"{first}.") for p in parts)

    def read(self, checkpoint: Checkpoint) -> tuple[MTPConfig, dict[str, Tensor]]:
        """The head's configuration and weights. Modules are counted, whatever the configuration says."""
        parts = {name: part for name in checkpoint.tensors if (part := _split(name)) is not None}
        numbers = sorted({int(part.module or 0) for part in parts.values()})
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise refused(checkpoint, f"its modules are numbered {shown(numbers)}; get those between, too")
        modules: list[dict[str, Tensor]] = [{} for _ in numbers]
        for name, part in parts.items():
            for found, what in _UNSUPPORTED.items():
                if found in f".{part.name}":
                    raise CheckpointError(f"{checkpoint.folder}: {name} is of {what}, which is not supported in an MTP")
            own, value = self._renamed(part.name), checkpoint.tensors[name]
            if own is not None:
                modules[numbers.index(int(part.module or 0))][own] = self.changed(checkpoint, own, value)
        sizes = self.sizes(checkpoint, modules[0])
        config = configured(
            checkpoint,
            MTPConfig,
            hidden_size=sizes.width,
            vocabulary=self.vocabulary(checkpoint),
            layer=sizes,
            num_modules=len(modules),
            speculative_tokens=self.speculative_tokens(checkpoint, len(modules)),
        )
        return config, {
            f"mtp_layers.{number}.{name}": value
            for number, weights in enumerate(modules)
            for name, value in weights.items()
        }

    def _renamed(self, name: str) -> str | None:
        """The head's own name; None for what it does not keep."""
        for own, there in self.renamed.items():
            if name.startswith(f"{there}."):
                return own + name.removeprefix(there)
        if any(name.startswith(f"{copy}.") for copy in self.copies):
            return None
        return f"layer.{name.removeprefix(self.layer)}"

    def changed(self, checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
        """A tensor as the head has it, by its own name."""
        return value

    def vocabulary(self, checkpoint: Checkpoint) -> int:
        """V."""
        return checkpoint.get("vocab_size", int, within=_layers_of(checkpoint.config))

    def speculative_tokens(self, checkpoint: Checkpoint, num_modules: int) -> int:
        """Drafts of a chain; 0 where nothing is said."""
        return 0

    def sizes(self, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> LayerSizes:
        """Sizes by the target's configuration, and what there is by the names of tensors."""
        entries = _layers_of(checkpoint.config)
        shapes = [weights[name].shape for kind in "qo" if (name := f"layer.self_attn.{kind}_proj.weight") in weights]
        is_gated = [len(shape) for shape in shapes] == [2, 2] and shapes[0][0] == 2 * shapes[1][1]
        if is_gated and not self.may_be_gated:
            raise CheckpointError(f"{checkpoint.folder}: attention of its layer is gated, which is supported for Qwen")
        sizes = read_layer(checkpoint, {**entries, "model_type": GATED if is_gated else "llama"})
        return replace(
            sizes,
            has_head_norms="layer.self_attn.q_norm.weight" in weights,
            has_qkv_bias="layer.self_attn.q_proj.bias" in weights,
            has_output_bias="layer.self_attn.o_proj.bias" in weights,
            has_mlp_bias="layer.mlp.up_proj.bias" in weights,
        )

    def write(self, config: MTPConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back. Heads are written in the layout of speculators."""
        raise NotImplementedError("an MTP is written in the layout of speculators")


class AppendedMTP(_Layout):
    """DeepSeek-V3 and GLM: one more layer behind the model's last."""

    name = "DeepSeek or GLM with MTP"
    prefix = "model.layers."
    renamed: ClassVar[Mapping[str, str]] = dict(
        zip(_OWN, ("enorm", "hnorm", "eh_proj", "shared_head.norm"), strict=True)
    )
    copies = ("shared_head.head", "embed_tokens")


class QwenMTP(_Layout):
    """Qwen3-Next and later: norms scale by 1 + weight there, and attention is gated."""

    name = "Qwen with MTP"
    prefix = "mtp."
    renamed: ClassVar[Mapping[str, str]] = dict(
        zip(_OWN, ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"), strict=True)
    )
    layer = "layers.0."
    may_be_gated = True

    def changed(self, checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
        """Weights of norms with the 1 added."""
        return _shifted(name, value, 1)


class MiMoMTP(_Layout):
    """MiMo-7B: the hidden state comes before the embedding there."""

    name = "MiMo with MTP"
    prefix = "model.mtp_layers."

    def changed(self, checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
        """What is projected in the order that the head has."""
        is_projection = name == "input_proj.weight" and value.dim() == 2
        return torch.cat([*reversed(value.chunk(2, 1))], 1) if is_projection else value


class SpeculatorsMTP(_Layout):
    """vllm-project/speculators, `speculators_model_type` mtp."""

    name = "speculators mtp"
    prefix = "mtp_layers."

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By `speculators_model_type`."""
        return config.get(TYPE) == "mtp"

    def speculative_tokens(self, checkpoint: Checkpoint, num_modules: int) -> int:
        """Drafts of a chain, by the default method of proposing tokens."""
        return read_speculative_tokens(checkpoint, default=num_modules if num_modules > 1 else 3)

    def vocabulary(self, checkpoint: Checkpoint) -> int:
        """V."""
        return checkpoint.get("vocab_size", int, within=self._entries(checkpoint))

    def changed(self, checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
        """The weights of norms with the 1 added that those of gated layers lack."""
        return _shifted(name, value, int(self._entries(checkpoint)["model_type"] == GATED))

    def sizes(self, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> LayerSizes:
        """Sizes by `transformer_layer_config`."""
        return read_layer(checkpoint, self._entries(checkpoint))

    def _entries(self, checkpoint: Checkpoint) -> dict[str, Any]:
        where = f"{checkpoint.folder / CONFIG}: transformer_layer_config"
        return filled(checkpoint.get("transformer_layer_config", dict), where)

    def write(self, config: MTPConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back."""
        entries = {
            **written_entries("mtp", "MTPSpeculator", config.speculative_tokens),
            "num_nextn_predict_layers": config.num_modules,
            "transformer_layer_config": {
                **written_layer(config.layer),
                "vocab_size": config.vocabulary,
                "num_hidden_layers": 1,
            },
        }
        lacking = -int(config.layer.is_gated)
        return entries, {
            name.replace(".layer.", ".", 1): _shifted(name, value, lacking) for name, value in weights.items()
        }
