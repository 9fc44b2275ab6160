"""`loading`: what is loaded decodes as what was exported."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import emssd_compile
import emssd_compile.export as targets
from emssd_compile.errors import OptionError
from emssd_compile.runtime.assembly import assemble
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.runtime.engine import Engine
from tests.exactness.models import Reference
from tests.export.toy import PROMPTS

pytestmark = pytest.mark.usefixtures("toy_target")


NEW = 12


def test_what_is_loaded_decodes_as_what_was_exported(fast, model, artifact):
    loaded = emssd_compile.load(artifact)
    reference = Reference(model)
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    fast.stats.reset()
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert loaded.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert loaded.stats.num_emitted_tokens == fast.stats.num_emitted_tokens == NEW * len(PROMPTS)
    assert (loaded.device, loaded.dtype) == (fast.device, fast.dtype)
    # The artifact's step applies all logits processors; that of `fast`, those that its requests ask for.
    assert [r.name for r in loaded.explain().records][: len(fast.explain().records)] == [
        r.name for r in fast.explain().records
    ]
    assert loaded.explain().ops.items() >= {("aten.argmax.default", 1), ("aten.masked_fill.Scalar", 1)}


def test_the_models_defaults_for_options_come_along(fast, model, artifact):
    """A tensor whose rows end early is padded with the model's own pad token."""
    eos = Reference(model)(PROMPTS[1], NEW)[3]
    ids = torch.tensor([PROMPTS[1]] * 2)
    ids[1, 3] = 7
    mask = torch.ones_like(ids)
    own, loaded = (
        decoder.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=eos)
        for decoder in (fast, emssd_compile.load(artifact))
    )
    assert isinstance(own, torch.Tensor)
    assert isinstance(loaded, torch.Tensor)
    assert own.tolist() == loaded.tolist()
    assert own[0, -1] == 3


@pytest.mark.parametrize("is_captured", [True, False])
def test_steps_are_captured_only_where_they_can_be(artifact, monkeypatch, is_captured):
    """On a CUDA device, that is; here, which sizes would be."""
    target = replace(targets.find_target("toy"), is_captured=is_captured)
    monkeypatch.setitem(sys.modules, "emssd_compile.export.toy", SimpleNamespace(TARGET=target))
    asked: list[int] = []

    def assembled(*args: Any, buckets: tuple[StepSizes, ...], **options: Any) -> Engine:
        asked.append(len(buckets))
        return assemble(*args, buckets=buckets, **options)

    monkeypatch.setattr("emssd_compile.loading.assemble", assembled)
    emssd_compile.load(artifact)
    assert (asked[0] > 0) == is_captured
    assert not targets.find_target("onnx").is_captured


def test_a_device_without_memory_is_no_place_to_decode(artifact):
    with pytest.raises(OptionError, match="runs on cpu, not on meta"):
        emssd_compile.load(artifact, device="meta")
