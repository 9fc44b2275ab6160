"""What configurations of all draft heads have in common in the layout of vllm-project/speculators."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from emssd_compile.checkpoints import CONFIG, Checkpoint
from emssd_compile.drafters.head import HeadSizes, Layout
from emssd_compile.errors import CheckpointError
from emssd_compile.numeric import shown

TYPE = "speculators_model_type"

D = TypeVar("D", int, None)


def read_speculative_tokens(checkpoint: Checkpoint, default: D) -> int | D:
    """K, of the default method of proposing tokens; the default if it is not said.

    Raises:
        CheckpointError: the method is unknown, or asks for tokens that the target would not choose.
    """
    where = checkpoint.folder / CONFIG
    methods = checkpoint.get("speculators_config.proposal_methods", list, [])
    chosen = checkpoint.get("speculators_config.default_proposal_method", str, "greedy")
    for method in methods:
        if not isinstance(method, Mapping) or method.get("proposal_type") != "greedy":
            raise CheckpointError(f"{where}: proposal_methods holds {shown(method)}; only 'greedy' is supported")
        most = checkpoint.get("verifier_accept_k", int, 1, within=method)
        tolerance = checkpoint.get("accept_tolerance", float, 0.0, within=method)
        if most > 1 or tolerance > 0:
            raise CheckpointError(
                f"{where}: verifier_accept_k = {most} and accept_tolerance = {tolerance} accept tokens that the target "
                "would not choose; set them to 1 and 0, and choose a lossy rule where one is wanted: "
                "optimize(acceptance=...)"
            )
    method = next((method for method in methods if method["proposal_type"] == chosen), {})
    count: int | None = checkpoint.get("speculative_tokens", int, None, within=method)
    if count is None:
        return default
    if count < 1:
        raise CheckpointError(f"{where}: speculative_tokens = {count}; it is to be at least 1")
    return count


class InSpeculators:
    """A kind of head for which speculators has no names of its own: its entries around another layout's tensors.

    Sizes are entries of the other layout, or of `transformer_layer_config`.

    Args:
        model_type: what `speculators_model_type` is.
        layouts: of the tensors.
    """

    def __init__(self, model_type: str, *layouts: Layout) -> None:
        self.name, self.model_type, self.layouts = f"speculators {model_type}", model_type, layouts

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By `speculators_model_type`."""
        return config.get(TYPE) == self.model_type

    def read(self, checkpoint: Checkpoint) -> tuple[HeadSizes, dict[str, Tensor]]:
        """The head's configuration and weights; `speculative_tokens` is an entry like the others then.

        Raises:
            CheckpointError: an entry makes no sense, or tensors are of none of the layouts.
        """
        config = {**checkpoint.get("transformer_layer_config", dict, {}), **checkpoint.config}
        config["model_type"] = config.pop(TYPE)
        if count := read_speculative_tokens(checkpoint, default=None):
            config["speculative_tokens"] = count
        layout = next((one for one in self.layouts if one.matches(config, checkpoint.tensors.keys())), None)
        if layout is None:
            known = ", ".join(one.name for one in self.layouts)
            raise CheckpointError(
                f"{checkpoint.folder}: {TYPE} is {self.model_type}, and the names of tensors are not those of: {known}"
            )
        return layout.read(replace(checkpoint, config=config))

    def write(self, config: Any, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The way back. Heads are written in the layout of their tensors."""
        raise NotImplementedError(f"a head is written in the layout of {self.layouts[0].name}")


def read_taps(checkpoint: Checkpoint, entry: str) -> tuple[int, ...] | None:
    """The layers whose outputs are read, by an entry whose ids count what goes into layers; None if it is silent.

    Raises:
        CheckpointError: an id is none, or is 0, the embedding.
    """
    ids = checkpoint.get(entry, list, [])
    if not all(type(number) is int and number >= 1 for number in ids):
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG}: {entry} = {shown(ids)}; ids count from 1, the output of the first layer: "
            "heads that read the embedding (0) are not supported"
        )
    return tuple(number - 1 for number in ids) or None


def written_entries(kind: str, architecture: str, num_draft_tokens: int) -> dict[str, Any]:
    """The entries that any head has, for one that drafts so many tokens."""
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": num_draft_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        TYPE: kind,
        "speculators_version": "0.3.0",
        "architectures": [architecture],
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [method],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None, "architectures": []},
        },
    }
