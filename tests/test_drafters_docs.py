"""What docs/drafters.md says of drafters: its examples run, and its tables leave none out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the examples are of Hugging Face models")

from torch import nn
from transformers import AutoModelForCausalLM

import emssd_compile
from emssd_compile import drafters
from emssd_compile.drafters import (
    DRAFTERS,
    HEADS,
    Drafter,
    DraftHead,
    Medusa,
    MLPSpeculator,
    NoDrafter,
    SuffixLookup,
)
from emssd_compile.drafters.medusa_config import MedusaConfig
from emssd_compile.step.drafting import TokenTables
from emssd_compile.step.proposals import SAMPLED
from emssd_compile.training.calibration import calibrate
from tests.drafters.contexts import target_of
from tests.zoo import VOCABULARY, toy_model

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "drafters.md").read_text()


def _is_drafter(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Drafter) and value not in (Drafter, DraftHead, NoDrafter)


CLASSES = {name for name in drafters.__all__ if _is_drafter(getattr(drafters, name))}
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| `")]
"""The cells of each line of its tables."""
GIVEN: dict[str, Any] = {
    **vars(drafters),
    "K": 2,
    "mask": 0,
    "layers": 1,
    "width": 2,
    "depth": 2,
    "first": SuffixLookup(),
    "second": SuffixLookup(),
}
"""What the expressions of the first table are made of, beside models."""


def test_its_examples_run(tmp_path, monkeypatch):
    loading, calibrating = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    demo: Any = AutoModelForCausalLM.from_pretrained("examples/demo_model/target")
    found: dict[str, Any] = {"emssd_compile": emssd_compile, "model": demo}
    exec(loading, found)
    assert type(found["fast"].drafter) is MLPSpeculator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(calibrate.__kwdefaults__ or {}, "backend", "eager")  # to be quick
    toy: Any = toy_model("llama")
    head = Medusa(MedusaConfig(64, VOCABULARY, 3))
    head.start_from(TokenTables(head=toy.lm_head.weight))
    head.save_pretrained("llama-medusa")
    exec(calibrating, {"model": toy, "prompts": [[5, 3, 9], [4]]})
    written = Medusa.from_pretrained("llama-medusa-63")
    assert written.config.tree == written.tree.paths
    assert 0 < written.num_draft_tokens <= 63


@pytest.mark.parametrize("cells", [cells for cells in ROWS if len(cells) > 3], ids=lambda cells: cells[0])
def test_what_its_table_says_can_be_made_and_draws_for_the_rules_that_it_says(cells):
    for written in re.findall(r"`([A-Z][^`]*)`", cells[0]):
        made = eval(written, {**GIVEN, "model": nn.Linear(1, 1)})
        if isinstance(made, type):
            assert issubclass(made, DraftHead)
            made = made.for_target(target_of(None, 1, 48, VOCABULARY, 64))
        assert (SAMPLED in made.proposes) == (cells[2] == "yes"), written


def test_its_tables_leave_out_no_drafter_and_no_kind_of_head():
    named = {name for cells in ROWS for name in re.findall(r"[\w-]+", cells[0])}
    assert CLASSES | DRAFTERS.keys() | {head.kind for head in HEADS} <= named
    (systems,) = re.findall(r"^## Systems\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert not {name for name in CLASSES - {"PromptLookup"} if f"`{name}" not in systems}
