"""What docs/embedding.md shows behind sessions is true: its examples run, are short, and give what the model gives."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="it is code for transformers that is shown")

import emssd_compile
from emssd_compile.drafters import DraftModel
from tests.exactness.models import build, prompt

_, *SECTIONS = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text().split("\n## ")
EXAMPLES = {
    section.splitlines()[0]: re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    for section in SECTIONS
}
PROMPTS = [prompt(n) for n in (7, 3, 12)]


def test_the_examples_are_short():
    assert all(len(example.splitlines()) < 15 for examples in EXAMPLES.values() for example in examples)


@pytest.fixture(scope="module")
def fast():
    return emssd_compile.optimize(build("llama"), max_batch=3, max_length=96, backend="eager", layout="packed")


def _run(section: str, number: int, **variables: Any) -> dict[str, Any]:
    exec(EXAMPLES[section][number], variables)
    return variables


def test_logits_and_losses(fast):
    ids = torch.tensor([PROMPTS[0]])
    section = "Logits, losses and evaluation harnesses"
    found = _run(section, 0, torch=torch, fast=fast, input_ids=ids, attention_mask=torch.ones_like(ids))
    expected = fast.model(ids, labels=ids)
    assert torch.equal(found["logits"], expected.logits)
    assert torch.equal(found["loss"], expected.loss)


def test_options_of_assisted_decoding(fast):
    optimize = functools.partial(emssd_compile.optimize, max_length=64, backend="eager", layout="packed")
    given = {"optimize": optimize, "DraftModel": DraftModel, "model": fast.model, "assistant": build("llama")}
    found = _run("transformers' own names", 0, **given, prompts=PROMPTS)
    assert found["texts"] == fast.generate(PROMPTS, max_new_tokens=16)
    assert found["assisted"].stats.num_draft_tokens > 0
