"""A small model, optimised, and what the toy target makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import emssd_compile
from emssd_compile.drafters import PromptLookup
from emssd_compile.optimized_model import OptimizedModel
from tests.exactness.compiled import K
from tests.exactness.models import build
from tests.export import toy


@pytest.fixture
def toy_target(monkeypatch):
    """Makes it one of the targets."""
    toy.install(monkeypatch)


@pytest.fixture(scope="session")
def model():
    model = build("llama")
    model.generation_config.pad_token_id = 3  # type: ignore[union-attr]  # a Hugging Face model
    return model


@pytest.fixture(scope="session")
def fast(model) -> OptimizedModel:
    return emssd_compile.optimize(model, PromptLookup(K), max_batch=2, max_length=64, backend="eager", prefill_chunk=16)


@pytest.fixture
def artifact(fast, toy_target, tmp_path) -> Path:
    return toy.export(fast, tmp_path / "artifact")
