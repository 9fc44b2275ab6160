"""A Llama as an ONNX model, for all that look at what is written."""

from __future__ import annotations

import onnx
import pytest

from tests.exactness.compiled import target


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> onnx.GraphProto:
    """A Llama, whose own attention has heads before tokens and groups of query heads."""
    folder = tmp_path_factory.mktemp("llama") / "artifact"
    compiled = target("llama", 3)
    compiled.optimize(compiled.drafter("none")).export_onnx(folder)
    return onnx.load(folder / "step.onnx").graph
