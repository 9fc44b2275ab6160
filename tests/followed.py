"""What tests of models that change after `optimize` share."""

from __future__ import annotations

from typing import Any

from torch import nn

import emssd_compile
from tests.exactness.models import Reference, prompt

PROMPT, NEW = prompt(17), 8


def compiled(model: Any, drafter: str | nn.Module = "none", **options: object) -> emssd_compile.OptimizedModel:
    """The model, compiled in the quickest way."""
    given = {"max_batch": 2, "max_length": 64, "backend": "eager", "layout": "packed", **options}
    return emssd_compile.optimize(model, drafter, **given)  # type: ignore[arg-type]


def assert_follows(fast: emssd_compile.OptimizedModel, model: Any) -> None:
    """The tokens are those of the model as it is now."""
    assert fast.generate([PROMPT], max_new_tokens=NEW) == [[*PROMPT, *Reference(model)(PROMPT, NEW)]]


def query(model: Any) -> Any:
    """A linear layer of a Llama."""
    return model.model.layers[0].self_attn.q_proj
