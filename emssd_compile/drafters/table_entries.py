"""How checkpoints write down heads that read layers of the target, and may have tables of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from emssd_compile.checkpoints import Checkpoint
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.draft_vocabulary import take_draft_ids
from emssd_compile.drafters.layout_checks import configured

C = TypeVar("C")

_EMBEDDING, _HEAD, _FC = "embed_tokens.weight", "lm_head.weight", "fc.weight"


def read_with_tables(
    checkpoint: Checkpoint,
    make: Callable[..., C],
    tensors: Mapping[str, Tensor],
    layer: LayerSizes,
    entries: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    trains_embedding: bool,
    **options: Any,
) -> tuple[C, dict[str, Tensor]]:
    """The configuration and weights.

    Args:
        checkpoint: what it is read from.
        make: the configuration's class.
        tensors: by the head's own names, but for those of the draft vocabulary.
        layer: sizes of its layers.
        entries: of its layers.
        sizes: width of the target (0: as wide as the layers), the size of the draft vocabulary and the number of layers
            that are read, the latter two for where nothing says them: `target`, `draft` and `taps`.
        trains_embedding: whether an embedding that is there differs from the target's.
        **options: attributes of the configuration.

    Raises:
        CheckpointError: an entry makes no sense, or the draft vocabulary is not the one that is said.
    """
    hidden_size, weights = sizes["target"] or layer.width, dict(tensors)
    vocabulary = checkpoint.get("vocab_size", int, within=entries)
    if not trains_embedding and layer.width == hidden_size:
        weights.pop(_EMBEDDING, None)
    config = configured(
        checkpoint,
        make,
        hidden_size=hidden_size,
        vocabulary=vocabulary,
        layer=layer,
        num_taps=len(options.get("taps") or ()) or _count_taps(weights, hidden_size, sizes["taps"]),
        draft_vocabulary=take_draft_ids(checkpoint, weights, vocabulary, sizes["draft"]),
        owns_embedding=_EMBEDDING in weights,
        owns_head=_HEAD in weights,
        **options,
    )
    return config, weights


def _count_taps(weights: Mapping[str, Tensor], hidden_size: int, default: int) -> int:
    """How many layers are read, where nothing says which: as many as are projected."""
    fc = weights.get(_FC)
    return default if fc is None or fc.dim() != 2 else max(1, fc.shape[1] // hidden_size)
