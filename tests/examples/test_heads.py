"""The heads that are shipped are those of their targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo model is a Hugging Face model")

from transformers import AutoModelForCausalLM, AutoTokenizer

import emssd_compile
from emssd_compile.drafters import load_head

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = EXAMPLES / "demo_model"
SHIPPED = [folder.parent for folder in sorted(EXAMPLES.glob("*/heads/*/config.json"))]
OF_SMOLLM2 = [folder.parent for folder in sorted((EXAMPLES / "smollm2_heads").glob("*/config.json"))]
NEW = 24


@pytest.fixture(scope="module")
def target() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32).eval()


def test_there_are_some():
    assert {folder.name for folder in SHIPPED} >= {"mlp", "recurrent", "medusa", "mtp"}
    assert {folder.name for folder in OF_SMOLLM2} >= {"eagle3", "recurrent"}


def test_they_are_small():
    """What everybody downloads who clones this: those of the demo model 10 MB together, of SmolLM2 each 20 MB."""
    size = {folder: (folder / "model.safetensors").stat().st_size for folder in (*SHIPPED, *OF_SMOLLM2)}
    assert sum(size[folder] for folder in SHIPPED) <= 10_000_000
    assert max(size[folder] for folder in OF_SMOLLM2) <= 20_000_000


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_head_drafts_what_its_target_says(folder, target):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "target")
    texts = ("def read(self, size=-1):\n    ", "import os\n\nclass Queue:\n", "for name in sorted(")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    expected = [
        target.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0].tolist() for ids in prompts
    ]
    fast = emssd_compile.optimize(
        target, load_head(folder), max_batch=3, max_length=96, backend="eager", layout="packed"
    )
    assert fast.generate(prompts, max_new_tokens=NEW, do_sample=False) == expected
    assert fast.stats.mean_acceptance_length > 1.2


@pytest.mark.parametrize("folder", OF_SMOLLM2, ids=lambda folder: folder.name)
def test_heads_whose_target_is_not_here_are_read(folder):
    """That of SmolLM2-135M: 576 wide, with 49,152 tokens and 30 layers."""
    config = load_head(folder).config
    assert (config.hidden_size, config.vocabulary) == (576, 49152)
    assert max(getattr(config, "taps", None) or (0,)) < 30
