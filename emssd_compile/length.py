"""What a model says of itself: how long a text may be, and how large it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer
from emssd_compile.step.drafting import TargetSizes

_LENGTH_ATTRIBUTES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length", "block_size")


def resolve_length(model: nn.Module, max_length: int | None) -> int:
    """C, tokens that a row shall hold: what was asked for, else what the model was trained for.

    Raises:
        OptionError: neither says; or it is no number, or more than the model allows.
    """
    if max_length is None:
        limit = _trained_length(getattr(model, "config", None))
        if limit is None:
            raise OptionError("max_length is needed: the model's config states no longest sequence")
        return limit
    max_length = integer("max_length", max_length, least=1)
    limit = length_limit(model)
    if limit is not None and max_length > limit:
        raise OptionError(f"max_length={max_length} is more than the {limit} positions the model was made for")
    return max_length


def length_limit(model: nn.Module) -> int | None:
    """The longest sequence that the model's config allows: scaling of positions may reach farther than training did."""
    return length_limit_of_config(getattr(model, "config", None))


def length_limit_of_config(config: Any) -> int | None:
    """The same, of a config."""
    trained = _trained_length(config)
    if trained is None:
        return None
    scalings = _rotary_scalings(text_config(config))
    return max([trained, *(_scaled_length(scaling, trained) for scaling in scalings)])


def declared_sizes(model: nn.Module, rows: int, capacity: int) -> TargetSizes | None:
    """What the LM head and the config of a model say of it as a target; None where they do not."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    layers = getattr(text_config(getattr(model, "config", None)), "num_hidden_layers", None)
    vocabulary, hidden_size = (getattr(head, name, None) for name in ("out_features", "in_features"))
    if isinstance(vocabulary, int) and isinstance(hidden_size, int) and isinstance(layers, int):
        return TargetSizes(rows, capacity, vocabulary, hidden_size, layers)
    return None


def _trained_length(config: Any) -> int | None:
    """The longest sequence that the config names, if it says."""
    text = text_config(config)
    found = [getattr(text, name, None) for name in _LENGTH_ATTRIBUTES]
    return next((value for value in found if _is_length(value)), None)


def text_config(config: Any) -> Any:
    """The part of a multimodal config that is about text; a config without parts itself."""
    find = getattr(config, "get_text_config", None)
    return find(decoder=True) if callable(find) else getattr(config, "text_config", config)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0  # -1 says "no limit"


def _rotary_scalings(config: Any) -> list[dict[str, Any]]:
    """The settings of rotary positions: one, or one for each type of layer."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(settings, dict):
        return []
    layers = [value for value in settings.values() if isinstance(value, dict)]
    return layers or [settings]


def _scaled_length(scaling: dict[str, Any], limit: int) -> int:
    """Positions that scaling stretches the trained ones to; 0 if the settings do not say."""
    trained, factor = scaling.get("original_max_position_embeddings", limit), scaling.get("factor")
    if not _is_length(trained) or not isinstance(factor, (int, float)) or not factor >= 1:
        return 0
    return int(trained * factor)
