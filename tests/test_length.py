"""How long a text a configuration allows: trained for, and stretched to."""

from types import SimpleNamespace

import pytest
import torch

from emssd_compile.errors import OptionError
from emssd_compile.length import resolve_length
from tests.zoo import toy_config

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "its own": (SimpleNamespace(n_positions=48), 48, 48),
    "no limit": (SimpleNamespace(max_position_embeddings=-1), None, None),
    "of the text": (SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=40)), 40, 40),
    "as transformers finds it": (toy_config("gemma4"), 131_072, 131_072),
    "scaled": (SimpleNamespace(max_position_embeddings=32, rope_parameters=YARN), 32, 128),
    "scaled, by its old name": (SimpleNamespace(max_position_embeddings=32, rope_scaling={"factor": 2.0}), 32, 64),
    "scaled for each type of layer": (
        SimpleNamespace(max_position_embeddings=32, rope_parameters={"full": YARN, "sliding": {"rope_theta": 1.0}}),
        32,
        128,
    ),
    "scaled already": (SimpleNamespace(max_position_embeddings=128, rope_parameters=YARN), 128, 128),
}


@pytest.mark.parametrize(("config", "default", "most"), CONFIGS.values(), ids=CONFIGS)
def test_the_longest_row_is_what_the_config_allows(config, default, most):
    model = torch.nn.Linear(2, 2)
    model.config = config
    if default is None:
        with pytest.raises(OptionError, match="max_length is needed"):
            resolve_length(model, None)
        return
    assert resolve_length(model, None) == default
    assert resolve_length(model, most) == most
    with pytest.raises(OptionError, match=f"more than the {most} positions"):
        resolve_length(model, most + 1)
