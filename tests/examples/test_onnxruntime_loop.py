"""The loop of docs/export.md, in numpy and onnxruntime alone, gives the model's own tokens."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from tests.exactness.models import Reference
from tests.export.subjects import ROWS, Small, artifact, prompt

SCRIPT = Path(__file__).parents[2] / "examples" / "07_onnxruntime_loop.py"
NEW = 24
PROMPTS = [prompt(n) for n in (1, 2, 7, 30, 61)]  # more than there are rows, and longer than a chunk


@pytest.fixture(scope="module")
def expected():
    reference = Reference(Small())
    return [[*ids, *reference(ids, NEW)] for ids in PROMPTS]


@pytest.mark.parametrize("drafter", ["lookup", "draft-model", "target-initialized"])
def test_tokens_are_the_models_own_with_drafts_in_chains_and_trees(drafter, expected):
    loop = runpy.run_path(str(SCRIPT))
    opened = loop["Artifact"](artifact("onnx", drafter))
    assert opened.tensors["history"].shape[0] == ROWS > 1
    assert loop["generate"](opened, PROMPTS, NEW) == expected
    accepted = opened.tensors["counters"][opened.manifest["counters"].index("num_accepted_draft_tokens")]
    assert accepted > 0
    assert loop["generate"](opened, PROMPTS[::-1], NEW) == expected[::-1], "whatever was in the rows before"


@pytest.mark.parametrize(
    ("prompts", "new", "said"),
    [
        ([[5], []], 4, "prompt 1 is no list of one or more tokens"),
        ([[-1]], 4, "prompt 0 is no list of one or more tokens from 0 to"),
        ([[5] * 4], 0, "0 new tokens"),
        ([[5], [5] * 100], 10_000, "prompt 0 has 1 tokens, and with 10000 new ones that is more than the"),
    ],
)
def test_what_a_row_cannot_hold_is_refused_before_any_work(prompts, new, said):
    loop = runpy.run_path(str(SCRIPT))
    opened = loop["Artifact"](artifact("onnx", "lookup"))
    with pytest.raises(ValueError, match=said):
        loop["generate"](opened, prompts, new)
    assert not opened.tensors["active"].any()


def test_a_row_can_be_filled_to_its_last_slot():
    loop = runpy.run_path(str(SCRIPT))
    opened = loop["Artifact"](artifact("onnx", "lookup"))
    capacity = opened.tensors["history"].shape[1]
    (text,) = loop["generate"](opened, [prompt(7)], capacity - 7)
    assert text == [*prompt(7), *Reference(Small())(prompt(7), capacity - 7)]


def test_the_loop_in_the_docs_is_that_of_the_script():
    shown = (SCRIPT.parents[1] / "docs" / "export.md").read_text()
    loop = shown.partition("```python\nwhile")[2].partition("```")[0]
    assert loop
    assert textwrap.indent(f"while{loop}", " " * 4) in SCRIPT.read_text()


def test_the_script_needs_neither_torch_nor_this_package(expected, tmp_path):
    for name in ("torch", "transformers", "emssd_compile"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    command = [sys.executable, str(SCRIPT), str(artifact("onnx", "lookup")), "--prompts", json.dumps(PROMPTS)]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(NEW)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
