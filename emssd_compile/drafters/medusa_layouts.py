"""How checkpoints hold Medusa's heads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from emssd_compile.checkpoints import Checkpoint
from emssd_compile.drafters.layout_checks import configured, matrix_size, refused
from emssd_compile.drafters.medusa_config import MedusaConfig
from emssd_compile.drafters.speculators import TYPE
from emssd_compile.errors import OptionError


class VllmLayout:
    """That of vLLM: `blocks.{k}.layers.{j}`, `lm_heads.{k}`, `token_map`. The head's own names are the same.

    A tree is written as `medusa_choices`, the name that FasterDecoding gives it. vLLM itself does not load heads that
    have no LM head of their own; another head is written so that it does.
    """

    name = "vLLM"
    model_type = "medusa"
    prefix = "medusa_heads."

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By the type that the config names."""
        is_own = config.get("model_type") == self.model_type and TYPE not in config
        return is_own and any("blocks." in name for name in names)

    def read(self, checkpoint: Checkpoint) -> tuple[MedusaConfig, dict[str, Tensor]]:
        """Sizes, and the tensors without their prefix.

        Raises:
            CheckpointError: an entry is missing or makes no sense, or `token_map` is no list of the target's tokens.
        """
        weights = {name.removeprefix(self.prefix): value for name, value in checkpoint.tensors.items()}
        vocabulary, shared = checkpoint.get("vocab_size", int), checkpoint.get("original_lm_head", bool, False)
        if (scale := checkpoint.get("logit_scale", float, 1.0)) != 1:
            raise refused(checkpoint, f"logit_scale is {scale}; only heads without one are read")
        num_heads = _count(r"blocks\.(\d+)\.", weights)
        if shared and "lm_head.weight" in weights:
            weights["lm_heads.0.weight"] = weights.pop("lm_head.weight")
        num_lm_heads = 1 if shared and "lm_heads.0.weight" in weights else 0 if shared else num_heads
        known = _token_map(checkpoint, weights, vocabulary)
        if known is not None:
            weights["token_map"] = known
            for name in [name for name in weights if name.startswith("lm_heads.")]:
                if weights[name].shape[0] == vocabulary > len(known):
                    weights[name] = weights[name][known]
        return configured(
            checkpoint,
            MedusaConfig,
            hidden_size=checkpoint.get("hidden_size", int),
            vocabulary=vocabulary,
            num_heads=num_heads,
            num_layers=_count(r"blocks\.\d+\.layers\.(\d+)\.", weights),
            num_lm_heads=num_lm_heads,
            draft_vocabulary=None if known is None else len(known),
            bias=any(name.startswith("blocks.") and name.endswith(".bias") for name in weights),
            tree=_choices(checkpoint),
        ), weights

    def write(self, config: MedusaConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back."""
        entries = {
            "model_type": self.model_type,
            "architectures": ["MedusaModel"],
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocabulary,
            "truncated_vocab_size": config.draft_vocabulary or config.vocabulary,
            "num_heads": config.num_heads,
            "num_hidden_layers": config.num_layers,
            "medusa_fc_bias": config.bias,
            "original_lm_head": config.num_lm_heads != config.num_heads,
        }
        if config.tree is not None:
            entries["medusa_choices"] = [list(path) for path in config.tree]
        return entries, dict(weights)


class FasterDecodingLayout:
    """That of FasterDecoding/Medusa and TGI: `{k}.{j}.linear`, and after L of them `{k}.{L}`, the LM head.

    Version 2 has no LM heads: the target's is used. Models that were trained together with their heads (Medusa-2) hold
    these behind `medusa_head.`; the rest is the target. Heads are counted, since the config is known to be wrong.
    """

    name = "FasterDecoding"
    prefix = "medusa_head."

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By the first block of the first head."""
        first = {"0.0.linear.weight", f"{self.prefix}0.0.linear.weight"}
        return TYPE not in config and not first.isdisjoint(names)

    def read(self, checkpoint: Checkpoint) -> tuple[MedusaConfig, dict[str, Tensor]]:
        """Sizes, those of tensors first, and the tensors by the head's own names.

        Raises:
            CheckpointError: an entry is missing or makes no sense.
        """
        tensors = checkpoint.tensors
        if f"{self.prefix}0.0.linear.weight" in tensors:
            tensors = {n.removeprefix(self.prefix): value for n, value in tensors.items() if n.startswith(self.prefix)}
        num_layers, lm_heads = _count(r"\d+\.(\d+)\.linear\.", tensors), re.compile(r"(\d+)\.(\d+)\.weight")
        weights = {}
        for name, value in tensors.items():
            own = re.sub(r"^(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2.", name)
            if (found := lm_heads.fullmatch(name)) and int(found[2]) == num_layers:
                own = f"lm_heads.{found[1]}.weight"
            weights[own] = value
        lm_head = next((value for name, value in weights.items() if name.startswith("lm_heads.")), None)
        vocabulary = checkpoint.get("vocab_size", int) if lm_head is None else matrix_size(checkpoint, lm_head)[0]
        num_heads = _count(r"(\d+)\.\d+\.linear\.", tensors)
        return configured(
            checkpoint,
            MedusaConfig,
            hidden_size=matrix_size(checkpoint, weights["blocks.0.layers.0.weight"])[1],
            vocabulary=vocabulary,
            num_heads=num_heads,
            num_layers=num_layers,
            num_lm_heads=0 if lm_head is None else num_heads,
            bias=any(name.endswith(".linear.bias") for name in tensors),
            tree=_choices(checkpoint),
        ), weights

    def write(self, config: MedusaConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back, where the layout knows such heads: those with a bias and all tokens."""
        if not config.bias or config.draft_vocabulary or config.num_lm_heads not in (0, config.num_heads):
            raise OptionError("the layout of FasterDecoding has no such Medusa; write that of vLLM")
        tensors = {}
        for name, value in weights.items():
            name = re.sub(r"^blocks\.(\d+)\.layers\.(\d+)\.", r"\1.\2.linear.", name)
            tensors[re.sub(r"^lm_heads\.(\d+)\.", rf"\1.{config.num_layers}.", name)] = value
        entries = {"medusa_num_heads": config.num_heads, "medusa_num_layers": config.num_layers}
        return {**entries, "hidden_size": config.hidden_size, "vocab_size": config.vocabulary}, tensors


def _count(pattern: str, names: Iterable[str]) -> int:
    """How many different numbers there are in names, where the pattern has its group."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def _choices(checkpoint: Checkpoint) -> list[Any] | None:
    """What is drafted if nothing else is said: a tree, or where only the number of drafts is known, a chain."""
    chain = [[0] * depth for depth in range(1, checkpoint.get("speculative_tokens", int, 0) + 1)]
    return checkpoint.get("medusa_choices", list, chain or None)


def _token_map(checkpoint: Checkpoint, weights: Mapping[str, Tensor], vocabulary: int) -> Tensor | None:
    """The target's id of each token of the draft vocabulary, int64 `[Vd]`. Raises CheckpointError."""
    size = checkpoint.get("truncated_vocab_size", int, None)
    known = weights.get("token_map")
    if known is None:
        if size not in (None, vocabulary):
            raise refused(checkpoint, f"truncated_vocab_size is {size}, and there is no tensor token_map")
        return None
    is_list = known.dim() == 1 and len(known) > 0 and not (known.is_floating_point() or known.is_complex())
    if not is_list or int(known.min()) < 0 or int(known.max()) >= vocabulary or len(known.unique()) != len(known):
        raise refused(checkpoint, f"token_map is to hold different ids below vocab_size, which is {vocabulary}")
    if size not in (None, len(known)):
        raise refused(checkpoint, f"truncated_vocab_size is {size}, and token_map has {len(known)} ids")
    return known.long()
