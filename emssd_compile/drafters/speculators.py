"""What configurations of all draft heads have in common in the layout of vllm-project/speculators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emssd_compile.checkpoints import CONFIG, Checkpoint
from emssd_compile.errors import CheckpointError
from emssd_compile.numeric import shown

TYPE = "speculators_model_type"


def read_speculative_tokens(checkpoint: Checkpoint, default: int) -> int:
    """K, of the default method of proposing tokens.

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
                "would not choose; set them to 1 and 0, and choose a lossy rule where one is wanted: optimize(rule=...)"
            )
    method = next((method for method in methods if method["proposal_type"] == chosen), {})
    count: int = checkpoint.get("speculative_tokens", int, default, within=method)
    if count < 1:
        raise CheckpointError(f"{where}: speculative_tokens = {count}; it is to be at least 1")
    return count


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
